"""A few-step LoRA with ControlNets, other base models and style LoRAs (paper, C.4 and C.5)."""
