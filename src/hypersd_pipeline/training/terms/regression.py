"""Regression on stored targets (Hyper-SD section 3.3: "+ MSE"; DMD's regression)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hypersd_pipeline.data.trajectories import NoisePairsConfig
from hypersd_pipeline.training.terms.base import Context, Scalars, TermConfig, View


class RegressionConfig(TermConfig):
    """Attributes: ``pairs``: the stored noise and the latents that it leads to."""

    kind: Literal["regression"] = "regression"
    pairs: NoisePairsConfig = NoisePairsConfig()

    def build(self, context: Context) -> Regression:
        """See `TermConfig`."""
        return Regression()


class Regression:
    """The mean squared distance of the student's sample to the latents that its noise leads to."""

    def __call__(self, view: View, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """See `Term`."""
        assert view.prediction.target is not None
        distance = (view.sample - view.prediction.target.to(view.sample)).square().mean()
        return distance, {"regression": distance.detach()}
