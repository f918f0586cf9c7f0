"""Which of several runs is better: a page, a verdict in a sentence, and the differences as metrics."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
