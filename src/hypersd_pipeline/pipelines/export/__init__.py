"""Files for other programs and for the hub."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
