"""The dedicated one-step UNet: every weight trained, with a time input of its own."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
