"""One step by distribution matching (Hyper-SD section 3.3): the critic, and the step of the student that it drives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.config import Strict
from hypersd_pipeline.diffusion.sampling import Denoiser, guided_denoiser
from hypersd_pipeline.diffusion.schedule import PredictionType, Schedule, add_noise, to_x0_eps
from hypersd_pipeline.models.adapters import AdaptedUNet
from hypersd_pipeline.objectives import distribution_matching as dmd
from hypersd_pipeline.objectives.adversarial import balanced
from hypersd_pipeline.objectives.feedback import hinge, predict_clean
from hypersd_pipeline.training.adversary import Adversary
from hypersd_pipeline.training.carry import carry
from hypersd_pipeline.training.feedback import RewardTerm

CRITIC = "critic"


class CriticConfig(Strict):
    """The network that learns what the student makes; an adapter on the frozen teacher, which it starts as.

    Attributes:
        updates: of the critic for each update of the student, on the student's samples of that update, with new noise and times. With
            gradient accumulation they are spread over the passes: where there are fewer updates than passes, each takes the mean gradient
            of several; where there are more, a pass has several.
        learning_rate, betas: of its AdamW. max_grad_norm: clipping.
    """

    updates: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.0, 0.99)
    max_grad_norm: float = Field(default=1.0, gt=0)


class MatchingConfig(Strict):
    """What the student is matched to, and how the terms are weighed.

    Attributes:
        time_input: what the student is told about pure noise. An eps model's error is multiplied by ``sigma / alpha``: 14.6 at the paper's
            999 for the LoRA, 5.1 at its 800 for the dedicated UNet. A LoRA that is told another than T - 1 needs it at one step
            (``timesteps=[800]``), and has its usual grid at more.
        matching_weight: of the distribution-matching gradient; 0 leaves critic and real score out.
        matching_batch: samples of a pass that are matched, and that the critic learns from; None: all. Matching costs several times what
            the student does, regression nothing.
        guidance: range of the teacher's scale in the real score, drawn uniformly per sample.
        renoise: share of T between which the student's samples are noised again to be judged.
        critic: see `CriticConfig`.
        regression_weight: of the squared distance between the student's sample and its stored target (see `PairsConfig`).
        consistency_weight: of the TSCD loss with one segment that keeps the steps from 2 on. consistency_batch: samples of it an update.
    """

    time_input: int = Field(default=999, ge=1)
    matching_weight: float = Field(default=1.0, ge=0)
    matching_batch: int | None = Field(default=None, ge=1)
    guidance: tuple[float, float]
    renoise: tuple[float, float] = (0.02, 0.98)
    critic: CriticConfig = CriticConfig()
    regression_weight: float = Field(default=0.0, ge=0)
    consistency_weight: float = Field(default=0.0, ge=0)
    consistency_batch: int = Field(default=16, ge=1)

    @field_validator("guidance")
    @classmethod
    def _scales(cls, guidance: tuple[float, float]) -> tuple[float, float]:
        if not 1 <= guidance[0] <= guidance[1]:
            raise ValueError(f"guidance must be a rising pair of scales from 1 on, not {list(guidance)}")
        return guidance

    @field_validator("renoise")
    @classmethod
    def _shares(cls, renoise: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= renoise[0] < renoise[1] < 1:
            raise ValueError(f"renoise must be a rising pair of shares of T between 0 and 1, not {list(renoise)}")
        return renoise


@dataclass(frozen=True)
class Share:
    """A pass's part in the critic's updates: how often it draws noise, the weight of each gradient, and whether the optimiser steps."""

    draws: int
    weight: float
    steps: bool


def shares(updates: int, passes: int) -> Iterator[Share]:
    """``updates`` steps spread evenly over ``passes``; the last pass always ends with one."""
    done = [p * updates // passes for p in range(passes + 1)]  # steps before each pass, and after all
    for before, after in pairwise(done):
        together = sum(other == before for other in done[:-1])  # passes whose gradients one step takes
        yield Share(max(1, after - before), 1 / together, steps=after > before)


class Critic:
    """The fake score: an adapter on the frozen teacher, trained on what the student makes, without guidance.

    Its optimiser is its own, not the loop's, since it steps several times for each step of the student. A step with a non-finite gradient
    is left out.
    """

    def __init__(
        self, adapters: AdaptedUNet, config: CriticConfig, schedule: Schedule, prediction_type: PredictionType, passes: int = 1
    ) -> None:
        self.config, self.schedule, self.prediction_type = config, schedule, prediction_type
        self.shares, self.passes_done = list(shares(config.updates, passes)), 0
        self.denoiser = adapters.denoiser(CRITIC)
        self.parameters = adapters.parameters(CRITIC)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=0.0)

    def update(self, samples: Tensor, cond: Conditioning, generator: torch.Generator) -> Tensor:
        """A pass's part of the ``updates``, on the student's clean samples ``[b, c, h, w]``, with ``t ~ U[0, T)``; the mean loss."""
        samples, losses = samples.detach(), []
        share = self.shares[self.passes_done]
        self.passes_done = (self.passes_done + 1) % len(self.shares)
        for _ in range(share.draws):
            t = torch.randint(self.schedule.num_train_timesteps, (len(samples),), generator=generator).to(samples.device)
            z = torch.randn(samples.shape, generator=generator).to(samples)
            output = self.denoiser(add_noise(samples, z, t, self.schedule), t, cond)
            loss = dmd.critic_loss(output, samples, z, t, self.schedule, self.prediction_type)
            (loss * share.weight).backward(inputs=self.parameters)
            losses.append(loss.detach())
            if not share.steps:
                continue
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            if bool(torch.isfinite(norm)):
                self.optimizer.step()
                torch.clear_autocast_cache()  # type: ignore[no-untyped-call]  # or autocast computes on with the weights as they were
            self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()

    def state_dict(self) -> dict[str, Any]:
        """The optimiser; the weights are in the adapters' state."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.optimizer.load_state_dict(state_dict["optimizer"])


@dataclass(frozen=True)
class Batch:
    """What one update of the student is made from.

    Attributes:
        z: pure noise ``[b, c, h, w]``. cond, uncond: of its prompts. prompts: the same as text, for rewards.
        target: clean latents to which ``z`` leads, or None without regression. real: clean latents of data, or None without adversary.
    """

    z: Tensor
    cond: Conditioning
    uncond: Conditioning
    prompts: Sequence[str] = ()
    target: Tensor | None = None
    real: Tensor | None = None


class MatchingStep:
    """Draw with one call, judge, and carry every term's gradient through the student once.

    Args:
        student: the network that is trained. teacher: the frozen base, for the real score.
        ready: called before the step ends: what makes ``student`` compute as it did, for gradient checkpointing in the backward pass.
        critic: needed for ``matching_weight`` above 0. adversary: DMD2's discriminator; "real" is data there.
        decode: clean latents to pictures, not clipped; needed with rewards.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        config: MatchingConfig,
        schedule: Schedule,
        prediction_type: PredictionType,
        *,
        ready: Callable[[], None] = lambda: None,
        critic: Critic | None = None,
        adversary: Adversary | None = None,
        rewards: Sequence[RewardTerm] = (),
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.student, self.teacher, self.config, self.ready = student, teacher, config, ready
        self.schedule, self.prediction = schedule, (schedule, prediction_type)
        self.critic, self.adversary, self.rewards, self.decode = critic, adversary, tuple(rewards), decode

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, whose gradient reaches the student only, and detached scalars to log."""
        samples = predict_clean(self.student, batch.z, self.config.time_input, batch.cond, *self.prediction)
        leaf = samples.detach().requires_grad_()
        terms, scalars = [], {}
        if self.critic is not None:
            some = slice(0, self.config.matching_batch)
            scalars["critic"] = self.critic.update(leaf[some], batch.cond[some], generator)
            toward = self._matching(self.critic, leaf[some].detach(), batch.cond[some], batch.uncond[some], generator)
            scalars["matching"] = toward.square().mean().sqrt()
            terms.append(self.config.matching_weight * dmd.matching_loss(leaf[some], toward))
        if batch.target is not None:
            distance = (leaf - batch.target.to(leaf)).square().mean()
            scalars["regression"] = distance.detach()
            terms.append(self.config.regression_weight * distance)
        if self.rewards:
            terms.append(self._feedback(leaf, batch.prompts, scalars))
        value = sum(terms, torch.zeros((), device=leaf.device))
        gradient = torch.autograd.grad(value, leaf)[0] if terms else torch.zeros_like(leaf)
        if self.adversary is not None and batch.real is not None:
            loss, toward = self._adversarial(self.adversary, leaf, batch, gradient, generator, scalars)
            value, gradient = value + loss, gradient + toward
        self.ready()
        return carry(samples, gradient, value), scalars

    def _matching(self, critic: Critic, samples: Tensor, cond: Conditioning, uncond: Conditioning, generator: torch.Generator) -> Tensor:
        """``(p_real - p_fake) / mean|p_real|`` at the student's samples; no graph."""
        with torch.no_grad():
            t = dmd.sample_renoise_timesteps(len(samples), self.schedule, generator, *self.config.renoise).to(samples.device)
            x_t = add_noise(samples, torch.randn(samples.shape, generator=generator).to(samples), t, self.schedule)
            low, high = self.config.guidance
            scale = (low + (high - low) * torch.rand(len(samples), generator=generator)).to(samples).view(-1, 1, 1, 1)
            real, _ = to_x0_eps(guided_denoiser(self.teacher, uncond, scale)(x_t, t, cond), x_t, t, *self.prediction)
            fake, _ = to_x0_eps(critic.denoiser(x_t, t, cond), x_t, t, *self.prediction)
            return dmd.matching_gradient(samples, real, fake)

    def _adversarial(
        self,
        adversary: Adversary,
        leaf: Tensor,
        batch: Batch,
        others: Tensor,
        generator: torch.Generator,
        scalars: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """DMD2's GAN term, samples against data, both noised to a shared time: the weighed loss and gradient."""
        assert batch.real is not None
        clean = torch.zeros(len(leaf), dtype=torch.int64, device=leaf.device)
        loss, judged = adversary.judge(leaf, clean, leaf, batch.real.to(leaf), clean, batch.cond, generator)
        scalars.update(judged)
        scalars["adversarial"] = loss.detach()
        (toward,) = torch.autograd.grad(loss, leaf)
        weight = adversary.config.weight
        return weight * loss.detach(), weight * (balanced(toward, others) if adversary.config.balance else toward)

    def _feedback(self, leaf: Tensor, prompts: Sequence[str], scalars: dict[str, Tensor]) -> Tensor:
        assert self.decode is not None
        images = self.decode(leaf)
        loss = torch.zeros((), device=leaf.device)
        for term in self.rewards:
            scores = term.reward.score(images, prompts)
            loss = loss + term.weight * hinge(scores, term.alpha)
            scalars[f"reward_{term.reward.name}"] = scores.detach().mean()
        return loss
