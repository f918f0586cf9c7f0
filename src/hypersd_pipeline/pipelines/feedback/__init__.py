"""Feedback learning: a LoRA of its own on top of a distilled one, its merges at several weights, and what each costs and brings."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
