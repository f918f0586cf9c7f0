"""Perceptual feedback (Hyper-SD eq. 14): an instance segmenter's loss on images that were noised and come back."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hypersd_pipeline.config import Count, Steps
from hypersd_pipeline.perception.config import PerceptualModelConfig
from hypersd_pipeline.perception.protocol import PerceptualModel
from hypersd_pipeline.training.terms.base import Context, Cost, Place, Scalars, TermConfig, View


class PerceptualConfig(TermConfig):
    """What the segmenter sees.

    Attributes:
        model: the instance segmenter. It needs a data set with instance masks.
        steps: how many steps before the end of the student's grid an image is noised to. None: half of the grid, as UniFL's 10 of 20. From
            pure noise nothing of the image would be left, and its instances could not be asked for.
        batch: annotated images of a pass.
    """

    kind: Literal["perceptual"] = "perceptual"
    model: PerceptualModelConfig
    steps: Steps | None = None
    batch: Count = 4

    place: ClassVar[Place] = "noised_image"
    needs_images: ClassVar[bool] = True

    def load(self, device: torch.device) -> PerceptualModel:
        """The segmenter, frozen. Raises UserError where its weights are missing or are not the model's."""
        return self.model.load(device)

    def build(self, context: Context) -> Perceptual:
        """See `TermConfig`."""
        assert context.perceptual is not None
        return Perceptual(context.perceptual)

    def start(self, steps: int) -> int:
        """Which point of a grid of ``steps`` points, counted from 0, images are noised to."""
        return steps - (self.steps or max(1, steps // 2))

    def forwards(self, cost: Cost) -> float:
        """The student on a batch of its own. The walk from the noised point is not counted."""
        return cost.student * self.batch / cost.batch

    def files(self) -> list[Path]:
        """See `TermConfig`."""
        return self.model.files()

    def check(self) -> None:
        """See `TermConfig`."""
        self.model.check()


class Perceptual:
    """The segmenter's training loss against the images' true instances."""

    def __init__(self, model: PerceptualModel) -> None:
        self.model = model

    def __call__(self, view: View, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """See `Term`."""
        loss = self.model.loss(view.images, view.prediction.instances)
        return loss, {"perceptual": loss.detach()}
