"""The anchor of feedback learning: what was distilled is to be held on to."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hypersd_pipeline.training.terms.base import Context, Cost, Scalars, TermConfig, View


class AnchorConfig(TermConfig):
    """The squared distance between the latents and those of the model without feedback."""

    kind: Literal["anchor"] = "anchor"

    def build(self, context: Context) -> Anchor:
        """See `TermConfig`."""
        return Anchor()

    def forwards(self, cost: Cost) -> float:
        """One pass of the model without feedback."""
        return 1.0


class Anchor:
    """Mean squared distance. Zero while the feedback LoRA changes nothing."""

    def __call__(self, view: View, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """See `Term`."""
        assert view.prediction.anchor is not None
        distance = (view.sample - view.prediction.anchor).square().mean()
        return distance, {"anchor": distance.detach()}
