"""Progressive distillation (arXiv 2202.00512): four stages, each the way its predecessor takes in one step."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
