"""The unified LoRA with ControlNets, other bases and style LoRAs."""

from .pipeline import create_pipeline

__all__ = ["create_pipeline"]
