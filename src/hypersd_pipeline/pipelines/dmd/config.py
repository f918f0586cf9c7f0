"""Configuration of the one-step stages."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from hypersd_pipeline.config import Strict
from hypersd_pipeline.diffusion.schedule import Schedule
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.pipelines.feedback.config import RewardTermConfig
from hypersd_pipeline.training.adversary import AdversarialConfig
from hypersd_pipeline.training.distillation import LoraConfig
from hypersd_pipeline.training.distribution import MatchingConfig
from hypersd_pipeline.training.loop import LoopConfig


class PairsConfig(Strict):
    """Noise and the latents it leads to, made once and kept: the targets of the regression term.

    Attributes:
        source: whose walk: the ``teacher``'s with guidance (DMD's ODE pairs), or the ``distilled`` model's, in a tenth of the time.
        count: pairs, each with a caption of the training split. steps: of DDIM on the trailing grid.
        guidance_scale: of the teacher. batch_size, seed: of the walk.
    """

    source: Literal["teacher", "distilled"] = "distilled"
    count: int = Field(default=2000, ge=1)
    steps: int = Field(default=4, ge=1)
    guidance_scale: float = Field(default=3.0, ge=1)
    batch_size: int = Field(default=64, ge=1)
    seed: int = 0


class OneStepConfig(Strict):
    """A one-step stage.

    Attributes:
        matching: the terms and their weights. pairs: used where ``matching.regression_weight`` is not 0.
        adversarial: DMD2's GAN term on noised data; ``pair: false, renoise: true`` is what fits here.
        rewards: terms of feedback on the student's pictures (paper 3.3: "+ feedback").
        feedback_weight: of the feedback LoRA in what the stage starts from.
        ema_decay: of the averaged weights, which are exported. ema_on_cpu: keep them there (the UNet; saves a UNet of GPU memory).
        gradient_checkpointing, decode_checkpointing: memory for time.
        sampling_eta: of the unified LoRA's contract.
        lora: of the student, where there is no LoRA that it starts from, and of the UNet's critic.
    """

    matching: MatchingConfig
    pairs: PairsConfig = PairsConfig()
    adversarial: AdversarialConfig = AdversarialConfig(pair=False, renoise=True)
    rewards: tuple[RewardTermConfig, ...] = ()
    feedback_weight: float = Field(default=1.0, ge=0)
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    ema_on_cpu: bool = False
    gradient_checkpointing: bool = False
    decode_checkpointing: bool = False
    sampling_eta: float = Field(default=0.0, ge=0, le=1)
    lora: LoraConfig
    loop: LoopConfig

    @model_validator(mode="after")
    def _sensible(self) -> OneStepConfig:
        weights = (self.matching.matching_weight, self.matching.regression_weight, self.adversarial.weight)
        if not any(weights):
            raise ValueError("matching.matching_weight, matching.regression_weight and adversarial.weight are all 0: set one of them")
        if self.adversarial.weight and self.adversarial.pair:
            raise ValueError("adversarial.pair: a one-step sample has no second point to be judged with; use false")
        if self.adversarial.weight and self.adversarial.encoder == "adapter":
            raise ValueError("adversarial.encoder: the one-step stages have the frozen encoder only; use frozen")
        return self

    def check_schedule(self, schedule: Schedule) -> None:
        """Raises UserError for a time input that the teacher's schedule does not have."""
        if self.matching.time_input >= schedule.num_train_timesteps:
            raise UserError(
                f"stage.matching.time_input is {self.matching.time_input}, but the teacher's timesteps end at "
                f"{schedule.num_train_timesteps - 1}; lower it."
            )

    def judge_files(self) -> list[Path]:
        """The weights of all rewards; see `FeedbackConfig.judge_files`."""
        return [path for term in self.rewards for path in term.reward.files()]

    @property
    def needs_pairs(self) -> bool:
        """Whether the regression term is on."""
        return self.matching.regression_weight > 0
