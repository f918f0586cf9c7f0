"""All candidates on one teacher, one data set and one budget of forward passes, over several seeds."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
