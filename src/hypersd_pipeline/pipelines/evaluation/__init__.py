"""Evaluation of teachers and of few-step LoRAs on one set of prompts, noise and references."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
