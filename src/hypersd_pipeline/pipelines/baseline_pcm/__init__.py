"""PCM (arXiv 2405.18407): four segments, always compared at the segment's start, with its adversarial term."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
