"""Perceptual models by configuration."""

from __future__ import annotations

import torch

from hypersd_pipeline.perception.config import PerceptualModelConfig
from hypersd_pipeline.perception.protocol import PerceptualModel


def load_perceptual_model(config: PerceptualModelConfig, device: torch.device | str = "cpu") -> PerceptualModel:
    """The frozen model that the configuration names. Call it before any training: it is what tells that weights are missing.

    Raises:
        UserError: the weights are missing or are not the model's.
    """
    return config.load(device)
