"""TCD (arXiv 2402.19159), that is CTM from scratch: the stage with one segment alone."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
