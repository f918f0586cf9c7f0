"""One step by distribution matching: the unified LoRA for 1 to 8 steps, and the dedicated one-step UNet."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
