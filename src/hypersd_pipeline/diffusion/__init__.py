"""The diffusion mathematics: schedule, DDIM, output conversion, guidance, grids and sampling. Tensors in, tensors out."""
