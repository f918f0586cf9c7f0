"""One step of consistency distillation: TSCD (Hyper-SD algorithm 1) and, with other settings, the methods it is compared with."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.config import Strict
from hypersd_pipeline.diffusion.grids import boundaries, check_grid, solver_grid
from hypersd_pipeline.diffusion.sampling import guided_denoiser
from hypersd_pipeline.diffusion.schedule import PredictionType, Schedule
from hypersd_pipeline.models.adapters import AdaptedUNet
from hypersd_pipeline.models.discriminator import watched_mid
from hypersd_pipeline.objectives import tscd
from hypersd_pipeline.objectives.adversarial import balanced
from hypersd_pipeline.training.adversary import ADAPTER, AdversarialConfig, Adversary
from hypersd_pipeline.training.carry import carry
from hypersd_pipeline.training.loop import LoopConfig

Stage = TypeVar("Stage", bound=BaseModel)


class LoraConfig(Strict):
    """Where the LoRA sits.

    Attributes:
        rank: of every pair; alpha equals it.
        target_modules: module-name endings.
    """

    rank: int = Field(ge=1)
    target_modules: tuple[str, ...] = Field(min_length=1)


class MethodConfig(Strict):
    """What is distilled in a step; the defaults are TSCD's.

    Attributes:
        solver_points: N, a grid that contains every segment boundary (40 does for 8, 4, 2 and 1).
        teacher: whose step drives the solver: the original model with guidance, or the previous stage's LoRA, where guidance is baked in.
        guidance: range of the teacher's guidance scale, drawn uniformly per sample.
        starts: the student stands anywhere on the grid, or at the segments' ends only (progressive distillation).
        ends: both sides are compared anywhere between, or at the segment's start only (PCM; with one segment LCM).
        target: the averaged student, the student itself (LCM), or the teacher's own further steps (progressive distillation).
        pure_noise: pure noise, not a noised picture, at the last grid point.
        offset_noise: strength of the noise perturbation.
        distance: squared error, or LCM's pseudo-Huber distance.
        mse_weight: of that distance.
        adversarial: the other half of the hybrid distance.
        ema_decay: mu of the averaged student, which is also what is exported.
        gradient_checkpointing: less memory for one more forward pass.
        sampling_eta: of the sampling contract, TCDScheduler's; 0 is DDIM, 1 is LCM's sampling.
        sampling_first: of the sampling contract: the timestep that one step is told, where it is not T - 1.
    """

    solver_points: int = Field(default=40, ge=1)
    teacher: Literal["base", "previous_stage"] = "base"
    guidance: tuple[float, float]
    starts: Literal["grid", "segment_ends"] = "grid"
    ends: Literal["uniform", "segment_start"] = "uniform"
    target: Literal["ema", "student", "solver"] = "ema"
    pure_noise: bool = True
    offset_noise: float = Field(default=0.05, ge=0)
    distance: Literal["mse", "huber"] = "mse"
    mse_weight: float = Field(default=1.0, ge=0)
    adversarial: AdversarialConfig = AdversarialConfig()
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    gradient_checkpointing: bool = False
    sampling_eta: float = Field(default=0.0, ge=0, le=1)
    sampling_first: int | None = Field(default=None, ge=1)
    lora: LoraConfig
    loop: LoopConfig

    @model_validator(mode="after")
    def _sensible(self) -> MethodConfig:
        if not 1 <= self.guidance[0] <= self.guidance[1]:
            raise ValueError(f"guidance must be a rising pair of scales from 1 on, not {list(self.guidance)}")
        if self.mse_weight == 0 and self.adversarial.weight == 0:
            raise ValueError("mse_weight and adversarial.weight are both 0: nothing would be trained; set one of them")
        return self


class StageConfig(MethodConfig):
    """One stage, complete. Attributes: ``segments`` is k; the others are `MethodConfig`'s."""

    segments: Literal[8, 4, 2, 1]


def changed(stage: Stage, **sections: Any) -> Stage:
    """The stage with other values; sections are merged key by key."""
    values = stage.model_dump()
    for name, value in sections.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    return type(stage).model_validate(values)


class DistillationStep:
    """The loss of one step: teacher, target, then the student, whose adapter stays in use for the backward pass.

    Args:
        adapters: with ``student``, ``ema`` and, for ``teacher: previous_stage``, ``previous``.
        device: where the batch is made.
        adversary: for ``adversarial.weight`` above 0.

    Raises:
        UserError: the solver's grid misses a segment boundary.
    """

    def __init__(
        self,
        adapters: AdaptedUNet,
        config: StageConfig,
        schedule: Schedule,
        prediction_type: PredictionType,
        device: torch.device,
        adversary: Adversary | None = None,
    ) -> None:
        self.adapters, self.config, self.device, self.adversary = adapters, config, device, adversary
        self.schedule, self.prediction = schedule, (schedule, prediction_type)
        self.grid = solver_grid(config.solver_points, schedule.num_train_timesteps)
        self.bounds = boundaries(config.segments, schedule.num_train_timesteps)
        check_grid(self.grid, self.bounds)
        self.solver = adapters.denoiser("previous" if config.teacher == "previous_stage" else None)
        self.student, self.target_network = adapters.denoiser("student"), adapters.denoiser("ema" if config.target == "ema" else "student")
        self.reuses_features = config.teacher == "base" and adversary is not None and adversary.takes_teachers_features
        self.distance = tscd.mse if config.distance == "mse" else tscd.huber

    def __call__(
        self, x0: Tensor, cond: Conditioning, uncond: Conditioning | None, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and detached scalars to log.

        Args:
            x0: clean latents ``[b, c, h, w]``. cond: of the batch. uncond: of the batch; unused with ``teacher: previous_stage``.
            generator: on the CPU; every random draw of the step.
        """
        z = tscd.offset_noise(tuple(x0.shape), self.config.offset_noise, generator)
        drawn = tscd.sample_timesteps(len(x0), self.grid, self.bounds, generator, starts=self.config.starts, ends=self.config.ends)
        times = tscd.Timesteps(*(t.to(self.device) for t in (drawn.t_n, drawn.t_prev, drawn.t_b, drawn.t_end)))
        low, high = self.config.guidance
        guidance = (low + (high - low) * torch.rand(len(x0), generator=generator)).to(self.device)
        x_tn = tscd.noisy_input(x0.to(self.device), z.to(self.device), times.t_n, self.schedule, pure_noise=self.config.pure_noise)
        target, seen = self._target(x_tn, times, cond, uncond if self.config.teacher == "base" else None, guidance)
        prediction = tscd.jump(self.student, x_tn, times.t_n, times.t_end, cond, *self.prediction)
        if self.adversary is None:
            distance = self.distance(prediction, target)
            return self.config.mse_weight * distance, {"distance": distance.detach()}
        return self._hybrid(self.adversary, x_tn, times, prediction, target, cond, generator, seen)

    def _target(
        self, x_tn: Tensor, times: tscd.Timesteps, cond: Conditioning, uncond: Conditioning | None, guidance: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The target, and the base model's mid features of ``x_tn`` where the adversary can use them."""
        solver = self.solver if uncond is None else guided_denoiser(self.solver, uncond, guidance.view(-1, 1, 1, 1))
        seen: Tensor | None = None
        if self.reuses_features:
            with watched_mid(self.adapters.unet) as features:
                xhat = tscd.solver_step(solver, x_tn, times, cond, *self.prediction)
            seen = features[0].chunk(2)[1]  # of the halves without and with the prompt
        else:
            xhat = tscd.solver_step(solver, x_tn, times, cond, *self.prediction)
        if self.config.target == "solver":
            return tscd.solver_target(solver, xhat, times, cond, *self.prediction, grid=self.grid.to(self.device)), seen
        return tscd.consistency_target(self.target_network, xhat, times, cond, *self.prediction), seen

    def _hybrid(
        self,
        adversary: Adversary,
        x_tn: Tensor,
        times: tscd.Timesteps,
        prediction: Tensor,
        target: Tensor,
        cond: Conditioning,
        generator: torch.Generator,
        seen: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both terms' gradients at the prediction, carried into the student's graph in one backward pass.

        The graph is cut at the prediction: each term is weighed there, the discriminator's graph is freed before the student's is walked,
        and gradient checkpointing recomputes each part with the adapter it was computed with.
        """
        config = self.config
        leaf = prediction.detach().requires_grad_()
        distance = self.distance(leaf, target)
        adversarial, scalars = adversary.judge(x_tn, times.t_n, leaf, target, times.t_end, cond, generator, seen)
        (towards_target,) = torch.autograd.grad(distance, leaf)
        (towards_real,) = torch.autograd.grad(adversarial, leaf)
        if config.adversarial.balance:
            towards_real = balanced(towards_real, towards_target)
        gradient = config.mse_weight * towards_target + config.adversarial.weight * towards_real
        self.adapters.use("student")
        value = config.mse_weight * distance + config.adversarial.weight * adversarial
        return carry(prediction, gradient, value), {"distance": distance.detach(), "adversarial": adversarial.detach(), **scalars}


def make_adapters(unet: object, config: StageConfig, start: object = None) -> AdaptedUNet:
    """The adapters that a stage needs on one UNet, all from the LoRA ``start`` of the stage before, if there is one."""
    names = ("student", "ema", "previous") if config.teacher == "previous_stage" else ("student", "ema")
    judged = config.adversarial.weight > 0 and config.adversarial.encoder == "adapter"
    return AdaptedUNet(
        unet,  # type: ignore[arg-type]
        rank=config.lora.rank,
        target_modules=config.lora.target_modules,
        names=names,
        trainable=("student", ADAPTER) if judged else ("student",),
        start=start,  # type: ignore[arg-type]
        encoder_names=(ADAPTER,) if judged else (),
        seed=config.loop.seed,
    )


def make_adversary(adapters: AdaptedUNet, config: StageConfig, schedule: Schedule, device: torch.device) -> Adversary | None:
    """A fresh adversary, or None where its weight is 0."""
    if config.adversarial.weight == 0:
        return None
    return Adversary(
        adapters,
        config.adversarial,
        schedule,
        segments=config.segments,
        passes=config.loop.accumulate,
        seed=config.loop.seed,
        device=device,
    )
