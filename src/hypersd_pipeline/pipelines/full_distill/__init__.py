"""The main job: from images to few-step LoRAs with their metrics."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
