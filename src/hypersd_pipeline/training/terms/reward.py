"""Aesthetic feedback (Hyper-SD eq. 13): a hinge on a reward of the student's images."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.objectives.feedback import hinge
from hypersd_pipeline.rewards import Reward, RewardConfig, load_reward
from hypersd_pipeline.rewards.text_image import TextImageConfig
from hypersd_pipeline.training.terms.base import Context, Scalars, TermConfig, View


class RewardTermConfig(TermConfig):
    """Attributes: ``reward``, and ``alpha``, the score from which on an image is good enough."""

    kind: Literal["reward"] = "reward"
    reward: RewardConfig
    alpha: float = Field(ge=-1e4, le=1e4)

    needs_images: ClassVar[bool] = True

    def build(self, context: Context) -> RewardTerm:
        """See `TermConfig`."""
        loaded = next((reward for config, reward in context.rewards if config == self.reward), None)
        return RewardTerm(load_reward(self.reward, context.device) if loaded is None else loaded, self.alpha)

    def files(self) -> list[Path]:
        """See `TermConfig`."""
        return self.reward.files()

    def check(self) -> None:
        """See `TermConfig`. The held-out reward is refused, which only reports."""
        self.reward.check()
        if isinstance(self.reward, TextImageConfig) and self.reward.role() == "held_out":
            raise UserError(f"{self.reward.weights}: is the held-out reward, which only reports; train on the file of text_image_reward.")


class RewardTerm:
    """``mean(ReLU(alpha - r(image, prompt)))``."""

    def __init__(self, reward: Reward, alpha: float) -> None:
        self.reward, self.alpha = reward, alpha

    def __call__(self, view: View, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """See `Term`."""
        scores = self.reward.score(view.images, view.prediction.prompts)
        return hinge(scores, self.alpha), {f"reward_{self.reward.name}": scores.detach().mean()}
