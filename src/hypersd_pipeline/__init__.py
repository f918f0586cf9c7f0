"""Hyper-SD training: from a diffusion teacher to LoRAs that generate in 1, 2, 4 or 8 steps."""

from hypersd_pipeline import compat

__version__ = "0.1.0"

compat.install()
