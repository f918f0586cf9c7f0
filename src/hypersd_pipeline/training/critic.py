"""The critic of distribution matching: the network that learns what the student makes (Hyper-SD section 3.3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.config import Decay, Rate, Strict
from hypersd_pipeline.draws import randint, randn
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.objectives import distribution_matching as dmd
from hypersd_pipeline.training.distributed import average_gradients

CRITIC = "critic"
"""The critic's adapter on the frozen teacher."""


class CriticConfig(Strict):
    """How the critic is trained. It starts as the teacher.

    Attributes:
        updates: of the critic for each update of the student, on the student's samples of that update, with new noise and times. With
            gradient accumulation they are spread over the passes: where there are fewer updates than passes, each takes the mean gradient
            of several. Where there are more, a pass has several.
        learning_rate, betas: of its AdamW. max_grad_norm: clipping.
    """

    updates: int = Field(default=2, ge=1, le=10**4)
    learning_rate: Rate = 1e-3
    betas: tuple[Decay, Decay] = (0.0, 0.99)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9)


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
    out.
    """

    def __init__(self, adapters: AdaptedBackbone, config: CriticConfig, passes: int = 1) -> None:
        self.config, self.process = config, adapters.process
        self.plans, self.passes_done = list(pass_plans(config.updates, passes)), 0
        self.denoiser = adapters.denoiser(CRITIC)
        self.parameters = adapters.parameters(CRITIC)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=0.0)

    def update(self, samples: Tensor, cond: Conditioning, generator: torch.Generator) -> Tensor:
        """A pass's part of the ``updates``, on the student's clean samples ``[b, c, h, w]``, with ``t ~ U[0, T)``. The mean loss."""
        samples, losses = samples.detach(), []
        plan = self.plans[self.passes_done]
        self.passes_done = (self.passes_done + 1) % len(self.plans)
        for _ in range(plan.draws):
            t = randint(0, self.process.num_train_timesteps, (len(samples),), generator).to(samples.device)
            z = randn(samples.shape, generator).to(samples)
            _, eps = self.denoiser.predict(self.process.add_noise(samples, z, t), t, cond)
            loss = dmd.critic_loss(eps, z)
            (loss * plan.weight).backward(inputs=self.parameters)
            losses.append(loss.detach())
            if plan.steps:
                self._step()
        return torch.stack(losses).mean()

    def _step(self) -> None:
        average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
            torch.clear_autocast_cache()  # type: ignore[no-untyped-call]  # or autocast computes on with the weights as they were
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser. The weights are in the adapters' state."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
