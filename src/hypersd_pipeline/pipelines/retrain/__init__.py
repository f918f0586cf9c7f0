"""Retraining on a schedule: new data, a challenger, the gate, the registry."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
