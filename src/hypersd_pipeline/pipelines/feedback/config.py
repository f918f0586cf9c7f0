"""Configuration of feedback learning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator

from hypersd_pipeline.config import Strict
from hypersd_pipeline.perception.config import PerceptualModelConfig
from hypersd_pipeline.perception.load import perceptual_files
from hypersd_pipeline.rewards import RewardConfig
from hypersd_pipeline.training.distillation import LoraConfig
from hypersd_pipeline.training.feedback import JudgementConfig
from hypersd_pipeline.training.guard import GuardConfig
from hypersd_pipeline.training.loop import LoopConfig

PACKAGED = "src/hypersd_pipeline/assets/judges/"
"""Where the judges of the embedded default lie."""


class RewardTermConfig(Strict):
    """Attributes: ``reward``, ``alpha`` (the score from which on a picture is good enough) and the ``weight`` of its hinge loss."""

    reward: RewardConfig
    alpha: float
    weight: float = Field(default=1.0, ge=0)


class FeedbackConfig(Strict):
    """Feedback learning (paper 3.2).

    Attributes:
        judgement: how pictures are drawn to be judged, and the weights of anchor and perceptual loss.
        rewards: those that are trained on. held_out: the one that is only reported, and watched by the guard.
        perceptual: the instance segmenter, or null for none; it needs a data set with instance masks.
        perceptual_batch: annotated pictures an update.
        lora: of the feedback LoRA; loop.batch_size counts prompts.
        merge_weights: of the merged LoRAs that are written and measured.
        test_pictures: annotated test pictures on which the mask AP of generated pictures is taken.
    """

    judgement: JudgementConfig = JudgementConfig()
    rewards: Annotated[tuple[RewardTermConfig, ...], Field(min_length=1)]
    held_out: RewardConfig
    perceptual: PerceptualModelConfig | None = None
    perceptual_batch: int = Field(default=4, ge=1)
    guard: GuardConfig = GuardConfig()
    gradient_checkpointing: bool = False
    lora: LoraConfig
    loop: LoopConfig
    merge_weights: Annotated[tuple[float, ...], Field(min_length=1)] = (0.5, 1.0)
    test_pictures: int = Field(default=200, ge=1)

    @field_validator("held_out", mode="before")
    @classmethod
    def _of_another_kind(cls, held_out: object) -> object:
        """An environment that names another kind is laid over base, whose packaged weights stay behind; they are not meant."""
        if isinstance(held_out, dict) and held_out.get("kind") != "text_image" and str(held_out.get("weights", "")).startswith(PACKAGED):
            return {name: value for name, value in held_out.items() if name != "weights"}
        return held_out

    @field_validator("merge_weights")
    @classmethod
    def _named_by_two_digits(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if min(weights) <= 0 or len({f"{weight:.2f}" for weight in weights}) < len(weights):
            raise ValueError("merge_weights must be above 0 and differ in their first two decimals, which name the merged LoRAs")
        return weights

    def judge_files(self) -> list[Path]:
        """The weights of all judges, found, fetched and checked.

        Raises:
            UserError: one is missing or has another sha256.
        """
        rewards = [*(term.reward for term in self.rewards), self.held_out]
        return [
            *(path for reward in rewards for path in reward.files()),
            *([] if self.perceptual is None else perceptual_files(self.perceptual)),
        ]
