"""Perceptual models: instance segmenters whose loss on a generated image is feedback for the generator (paper eq. 14)."""
