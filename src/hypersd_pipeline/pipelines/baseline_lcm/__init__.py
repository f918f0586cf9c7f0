"""LCM-LoRA (arXiv 2311.05556) as a configuration of the distillation stage: one segment, always compared at the clean end."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
