"""The dedicated one-step UNet: every weight trained, time input 800."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
