"""A full-size rehearsal of an environment on random weights."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
