"""The main job: from pictures to few-step LoRAs with their figures."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
