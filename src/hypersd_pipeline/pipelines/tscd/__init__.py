"""Trajectory-segmented consistency distillation: stages with 8, 4, 2 and 1 segments."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
