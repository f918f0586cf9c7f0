"""Perceptual models by configuration."""

from __future__ import annotations

from pathlib import Path

import torch

from hypersd_pipeline.perception.config import Mask2FormerConfig, SoloConfig
from hypersd_pipeline.perception.protocol import PerceptualModel


def load_perceptual_model(config: SoloConfig | Mask2FormerConfig, device: torch.device | str = "cpu") -> PerceptualModel:
    """The frozen model that the configuration names. Call it before any training: it is what tells that weights are missing.

    Raises:
        UserError: the weights are missing or are not the model's.
    """
    if isinstance(config, SoloConfig):
        from hypersd_pipeline.perception.solo import load_solo

        return load_solo(config, device)
    from hypersd_pipeline.perception.mask2former import load_mask2former

    return load_mask2former(config, device)


def perceptual_files(config: SoloConfig | Mask2FormerConfig) -> list[Path]:
    """The files of the model that the configuration names, found, fetched and checked. Raises UserError."""
    if isinstance(config, SoloConfig):
        from hypersd_pipeline.perception.solo import solo_files

        return solo_files(config)
    from hypersd_pipeline.perception.mask2former import mask2former_files

    return mask2former_files(config)
