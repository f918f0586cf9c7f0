"""Perceptual models: instance segmenters whose loss on a generated picture is feedback for the generator (paper eq. 14)."""
