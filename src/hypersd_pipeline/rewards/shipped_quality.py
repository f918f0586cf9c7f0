"""The packaged image-quality head: how clean an image looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from hypersd_pipeline.config import Strict
from hypersd_pipeline.models.dual_encoder import DualEncoder, load_dual_encoder
from hypersd_pipeline.models.quality_head import QualityHead, check_quality_head, load_quality_head
from hypersd_pipeline.rewards.base import check_images_and_prompts, straight_through_clamp


class ShippedQualityConfig(Strict):
    """Nothing to choose: the files ship with the package."""

    kind: Literal["shipped_quality"] = "shipped_quality"

    def files(self) -> list[Path]:
        """None of the user's."""
        return []

    def check(self) -> None:
        """Raises UserError for a packaged file that is missing or damaged."""
        check_quality_head()

    def load(self, device: torch.device | str) -> ShippedQuality:
        """The packaged head on the packaged dual encoder, frozen.

        Raises:
            UserError: a packaged file is missing or damaged.
        """
        encoder = load_dual_encoder().to(device)
        return ShippedQuality(encoder, load_quality_head(encoder))


class ShippedQuality(nn.Module):
    """Mean 0 and deviation 1 on clean images of the embedded data, far below zero on broken ones. Prompts are ignored."""

    name = "shipped_quality"

    def __init__(self, encoder: DualEncoder, head: QualityHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        check_images_and_prompts(images, prompts)
        return self.head(self.encoder.encode_images(straight_through_clamp(images)))
