"""The configurations of all perceptual models. Each has ``files() -> list[Path]`` and ``load(device) -> PerceptualModel``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hypersd_pipeline.perception.mask2former import Mask2FormerConfig
from hypersd_pipeline.perception.small_solo import SmallSoloConfig
from hypersd_pipeline.perception.solo import SoloConfig

__all__ = ["Mask2FormerConfig", "PerceptualModelConfig", "SmallSoloConfig", "SoloConfig"]

PerceptualModelConfig = Annotated[SoloConfig | Mask2FormerConfig, Field(discriminator="kind")]
"""Which perceptual model, and where its weights are. Another kind is one name more here."""
