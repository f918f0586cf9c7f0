"""The critic of distribution matching: the network that learns what the student makes (Hyper-SD section 3.3)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning, moved
from hypersd_pipeline.config import Decay, Rate, Strict, Width
from hypersd_pipeline.draws import randint, randn
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.objectives import distribution_matching as dmd
from hypersd_pipeline.training.distributed import average_gradients
from hypersd_pipeline.training.loop import Steps, adamw

log = logging.getLogger(__name__)

CRITIC = "critic"
"""The critic's adapter on the frozen teacher."""
ALARM_AFTER = 10
"""Skipped updates in a row before a warning, and between two warnings."""


class CriticConfig(Strict):
    """How the critic is trained. It starts as the teacher.

    Attributes:
        updates: of the critic for each update of the student, on the student's samples of that update, with new noise and times. With
            gradient accumulation they are spread over the passes: where there are fewer updates than passes, each takes the mean gradient
            of several. Where there are more, a pass has several.
        learning_rate, betas: of its AdamW. max_grad_norm: clipping.
        warmup_updates: of the critic alone, on samples of the student as it starts, before the student's first update. Each takes the
            samples of one pass. Without them the student follows a critic that is still the teacher.
        rank: of its LoRA. None: the student's.
    """

    updates: int = Field(default=2, ge=1, le=10**4)
    learning_rate: Rate = 1e-3
    betas: tuple[Decay, Decay] = (0.0, 0.99)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9)
    warmup_updates: int = Field(default=0, ge=0, le=10**6)
    rank: Width | None = None

    later: ClassVar[frozenset[str]] = frozenset({"warmup_updates", "rank"})


@dataclass(frozen=True)
class PassPlan:
    """A pass's part in the critic's updates: how often it draws noise, the weight of each gradient, and whether the optimiser steps."""

    draws: int
    weight: float
    steps: bool


def pass_plans(updates: int, passes: int) -> Iterator[PassPlan]:
    """``updates`` steps spread evenly over ``passes``. The last pass always ends with one."""
    done = [p * updates // passes for p in range(passes + 1)]  # steps before each pass, and after all
    for before, after in pairwise(done):
        together = sum(other == before for other in done[:-1])  # passes whose gradients one step takes
        yield PassPlan(max(1, after - before), 1 / together, steps=after > before)


class Critic:
    """The fake score: an adapter on the frozen teacher, trained on what the student makes, without guidance.

    Its optimiser is not the loop's, since it steps several times for each step of the student. A step with a non-finite gradient is left
    out and counted. Many in a row are said in the log.

    Attributes:
        steps: taken and left out. warmed: updates of the warm-up that are done.
    """

    def __init__(self, adapters: AdaptedBackbone, config: CriticConfig, passes: int = 1) -> None:
        self.config, self.process = config, adapters.process
        self.plans, self.passes_done = list(pass_plans(config.updates, passes)), 0
        self.denoiser = adapters.denoiser(CRITIC)
        self.parameters = adapters.parameters(CRITIC)
        self.optimizer = adamw(self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=0.0)
        self.steps = Steps([self.optimizer])
        self.warmed = self.said = 0

    @property
    def cold(self) -> bool:
        """Whether the warm-up is not over."""
        return self.warmed < self.config.warmup_updates

    def warm_up(self, samples: Tensor, cond: Conditioning, generator: torch.Generator) -> None:
        """One update of the warm-up, on the samples of a pass."""
        self._learn(samples.detach(), cond, generator, 1.0)
        self._step()
        self.warmed += 1

    def slow(self, factor: float) -> None:
        """Make the learning rate ``factor`` times the configured one: after a rollback the loop halves all rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor

    def update(self, samples: Tensor, cond: Conditioning, generator: torch.Generator) -> Tensor:
        """A pass's part of the ``updates``, on the student's clean samples ``[b, c, h, w]``, with ``t ~ U[0, T)``. The mean loss."""
        samples, losses = samples.detach(), []
        plan = self.plans[self.passes_done]
        self.passes_done = (self.passes_done + 1) % len(self.plans)
        for _ in range(plan.draws):
            losses.append(self._learn(samples, cond, generator, plan.weight))
            if plan.steps:
                self._step()
        return torch.stack(losses).mean()

    def _learn(self, samples: Tensor, cond: Conditioning, generator: torch.Generator, weight: float) -> Tensor:
        """Add ``weight`` times the gradient of one draw of noise and times. The loss."""
        t = moved(randint(0, self.process.num_train_timesteps, (len(samples),), generator), samples.device)
        z = moved(randn(samples.shape, generator), samples.device).to(samples)
        _, eps = self.denoiser.predict(self.process.add_noise(samples, z, t), t, cond)
        loss = dmd.critic_loss(eps, z)
        (loss * weight).backward(inputs=self.parameters)
        return loss.detach()

    def _step(self) -> None:
        average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.steps.take(torch.isfinite(norm))
        torch.clear_autocast_cache()  # type: ignore[no-untyped-call]  # or autocast computes on with the weights as they were
        if self.steps.waits:
            self.read()

    @property
    def skipped(self) -> int:
        """Steps that were left out so far, at the last `read`."""
        return self.steps.skipped

    def read(self) -> None:
        """Bring the count of skipped steps up to date, and warn where many in a row were. Waits for the device."""
        self.steps.read()
        row = self.steps.in_a_row
        if row // ALARM_AFTER > self.said:
            log.warning(
                "The critic's last %d updates had a non-finite loss or gradient and were skipped: it learns nothing, and the student "
                "follows a critic of the past. Lower matching.critic.learning_rate or the loop's.",
                row,
            )
        self.said = row // ALARM_AFTER

    def state_dict(self) -> dict[str, Any]:
        """The optimiser and the counts. The weights are in the adapters' state."""
        self.read()
        return {"optimizer": self.optimizer.state_dict(), "skipped": self.skipped, "warmed": self.warmed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.steps.set(state_dict.get("skipped", 0), 0)
        self.warmed, self.said = state_dict.get("warmed", 0), 0
