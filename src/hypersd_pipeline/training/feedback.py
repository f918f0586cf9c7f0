"""One step of feedback learning: draw with the distilled student, judge the picture, and hold on to what was distilled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.config import Strict
from hypersd_pipeline.diffusion.grids import trailing_timesteps
from hypersd_pipeline.diffusion.schedule import PredictionType, Schedule, add_noise
from hypersd_pipeline.models.adapters import AdaptedUNet
from hypersd_pipeline.objectives import feedback
from hypersd_pipeline.perception.protocol import Instances, PerceptualModel
from hypersd_pipeline.rewards.base import Reward

STUDENT = "feedback"


class JudgementConfig(Strict):
    """How pictures are drawn to be judged, and how the terms are weighed.

    Attributes:
        steps: of the student's own grid (trailing).
        gradient_steps: how many of the last steps may be the one with gradient; one is drawn per update.
        anchor_weight: of the squared distance between the latents and those of the distilled model without feedback.
        perceptual_weight: of the perceptual model's loss.
        perceptual_steps: how many steps before the end a noised real picture starts; null: half of the grid, as UniFL's 10 of 20. From
            pure noise nothing of the picture would be left, and its instances could not be asked for.
        decode_checkpointing: decode picture by picture, and again in the backward pass, for SDXL's memory.
    """

    steps: int = Field(default=4, ge=1)
    gradient_steps: int = Field(default=2, ge=1)
    anchor_weight: float = Field(default=1.0, ge=0)
    perceptual_weight: float = Field(default=1.0, ge=0)
    perceptual_steps: int | None = Field(default=None, ge=1)
    decode_checkpointing: bool = False

    @model_validator(mode="after")
    def _on_the_grid(self) -> JudgementConfig:
        if self.perceptual_steps is not None and self.perceptual_steps > self.steps:
            raise ValueError(f"perceptual_steps is {self.perceptual_steps}, more than the {self.steps} steps of the grid")
        return self

    @property
    def noised_at(self) -> int:
        """Which point of the grid, counted from 0, real pictures are noised to."""
        return self.steps - (self.perceptual_steps or max(1, self.steps // 2))


@dataclass(frozen=True)
class RewardTerm:
    """A reward, the score ``alpha`` from which on a picture is good enough, and the weight of its hinge loss."""

    reward: Reward
    alpha: float
    weight: float


@dataclass(frozen=True)
class Annotated:
    """Real pictures with instances: clean latents ``[b, c, h, w]``, their conditioning, and the instances of each."""

    latents: Tensor
    cond: Conditioning
    instances: Sequence[Instances]


class FeedbackStep:
    """``L_aes + L_percep`` (eq. 13 to 15), with an anchor.

    Args:
        adapters: on the UNet into which the TSCD LoRA has been merged; with the adapter ``feedback``. Adapters off are the distilled model.
        decode: clean latents -> pictures ``[b, 3, h, w]``, not clipped: rewards and perceptual models take care of that without killing
            the gradient of saturated pixels.
    """

    def __init__(
        self,
        adapters: AdaptedUNet,
        config: JudgementConfig,
        schedule: Schedule,
        prediction_type: PredictionType,
        decode: Callable[[Tensor], Tensor],
        rewards: Sequence[RewardTerm],
        perceptual: PerceptualModel | None = None,
    ) -> None:
        self.config, self.schedule, self.prediction = config, schedule, (schedule, prediction_type)
        self.student, self.distilled = adapters.denoiser(STUDENT), adapters.denoiser(None)
        self.decode, self.rewards, self.perceptual = decode, tuple(rewards), perceptual
        self.timesteps: list[int] = trailing_timesteps(config.steps, schedule.num_train_timesteps).tolist()

    def __call__(
        self, noise: Tensor, cond: Conditioning, prompts: Sequence[str], real: Annotated | None, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and detached scalars to log.

        Args:
            noise: pure noise ``[b, c, h, w]``, from which the pictures of ``prompts`` are drawn.
            real: what the perceptual term needs; None leaves the term out.
        """
        at = self._gradient_step(generator)
        x_t = feedback.advance(self.student, noise, self.timesteps[: at + 1], cond, *self.prediction)
        with torch.no_grad():  # before the student's call: with gradient checkpointing that must be the last
            anchor = feedback.predict_clean(self.distilled, x_t, self.timesteps[at], cond, *self.prediction)
        clean = feedback.predict_clean(self.student, x_t, self.timesteps[at], cond, *self.prediction)
        distance = (clean - anchor).square().mean()
        images = self._decoded(clean)
        loss, scalars = self.config.anchor_weight * distance, {"anchor": distance.detach()}
        for term in self.rewards:
            scores = term.reward.score(images, prompts)
            loss = loss + term.weight * feedback.hinge(scores, term.alpha)
            scalars[f"reward_{term.reward.name}"] = scores.detach().mean()
        if real is not None and self.perceptual is not None:
            perceived = self._perceive(self.perceptual, real, generator)
            loss = loss + self.config.perceptual_weight * perceived
            scalars["perceptual"] = perceived.detach()
        return loss, scalars

    def _perceive(self, perceptual: PerceptualModel, real: Annotated, generator: torch.Generator) -> Tensor:
        """Noise real latents to a point of the grid, come back to a later one, and judge the picture against its instances (eq. 14)."""
        start = self.config.noised_at
        end = self._gradient_step(generator, after=start)
        z = torch.randn(real.latents.shape, generator=generator).to(real.latents)
        at = torch.full((len(z),), self.timesteps[start], device=z.device)
        x_t = feedback.advance(
            self.student, add_noise(real.latents, z, at, self.schedule), self.timesteps[start : end + 1], real.cond, *self.prediction
        )
        clean = feedback.predict_clean(self.student, x_t, self.timesteps[end], real.cond, *self.prediction)
        return perceptual.loss(self._decoded(clean), real.instances)

    def _gradient_step(self, generator: torch.Generator, after: int = -1) -> int:
        """One of the grid's last ``gradient_steps``, later than the point ``after`` where there is a later one."""
        count = len(self.timesteps)
        first = min(max(count - self.config.gradient_steps, after + 1, 0), count - 1)
        return int(torch.randint(first, count, (1,), generator=generator))

    def _decoded(self, clean: Tensor) -> Tensor:
        return decoded_one_by_one(self.decode, clean) if self.config.decode_checkpointing else self.decode(clean)


def decoded_one_by_one(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """Pictures whose decoding is computed again in the backward pass, one by one: then the decoder's activations are held for one only.

    At 1024 pixels they take some 20 GB a picture in float32, by count. Around a whole batch, checkpointing would hold all of them at once.
    """
    return torch.cat([checkpoint(decode, one, use_reentrant=False) for one in latents.split(1)])
