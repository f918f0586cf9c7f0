"""The distillation chain once per seed, and one table of all of them."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
