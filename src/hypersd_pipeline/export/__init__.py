"""Files for other programs: kohya's layout, ONNX, and a model card for the Hugging Face hub."""
