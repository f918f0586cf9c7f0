"""The unified LoRA on both grids of timesteps, over a range of eta."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
