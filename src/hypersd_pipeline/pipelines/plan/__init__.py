"""Memory, hours, cost and disk of an environment before it runs."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
