"""The training node of a TSCD stage."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.diffusion.grids import boundaries, check_grid, solver_grid
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.adapters import AdaptedUNet
from hypersd_pipeline.models.lora import LoRA, sampling_contract
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.objectives import tscd
from hypersd_pipeline.pipelines.tscd.config import StageConfig, StageOverrides, TscdDefaults
from hypersd_pipeline.training.checkpoints import CheckpointStore, fingerprint
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import MetricStream, make_accelerator, train

log = logging.getLogger(__name__)


def train_stage(
    latents: LatentCache,
    teacher: TeacherConfig,
    defaults: TscdDefaults,
    stage: StageOverrides,
    checkpoints: CheckpointStore,
    metric_stream: MetricStream,
    previous: LoRA | None = None,
) -> tuple[LoRA, dict[str, float]]:
    """Distil one stage (Hyper-SD algorithm 1) and return its LoRA, the averaged weights, with its sampling contract, and its figures.

    Args:
        latents: the cache; its ``train`` split is used.
        previous: the LoRA of the stage before, from which this one starts.

    Raises:
        UserError: the grid misses a boundary, ``teacher: previous_stage`` without one, or the cache was made by another teacher.
    """
    config = stage.apply(defaults)
    accelerator = make_accelerator(config.loop)
    model = load_teacher(teacher, parts=("unet",), device=accelerator.device)
    T = model.schedule.num_train_timesteps
    grid, bounds = solver_grid(config.solver_points, T), boundaries(config.segments, T)
    check_grid(grid, bounds)
    if config.teacher == "previous_stage" and previous is None:
        raise UserError(
            f"tscd_k{config.segments}.stage.teacher: previous_stage needs a stage before this one; use base for the first stage."
        )
    latents.require_teacher(model)
    adapters = _adapters(model, config, previous)
    loss_fn = _Objective(latents, model, adapters, config, grid, bounds, accelerator.device)
    student, ema = adapters.parameters("student"), adapters.parameters("ema")
    report = train(
        f"tscd_k{config.segments}",
        parameters=student,
        loss_fn=loss_fn,
        config=config.loop,
        state={"adapters": adapters},
        key=fingerprint(
            {**config.model_dump(mode="json"), "loop": config.loop.identity()}, latents.key, _teacher_key(model), _lora_key(previous)
        ),
        checkpoints=checkpoints,
        metrics=metric_stream,
        accelerator=accelerator,
        after_update=lambda: ema_update(ema, student, config.ema_decay),
    )
    return adapters.export("ema", _metadata(config, model, latents)), report


def _adapters(model: Teacher, config: StageConfig, previous: LoRA | None) -> AdaptedUNet:
    names = ("student", "ema", "previous") if config.teacher == "previous_stage" else ("student", "ema")
    adapters = AdaptedUNet(
        model.unet, rank=config.lora.rank, target_modules=config.lora.target_modules, names=names, start=previous, seed=config.loop.seed
    )
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.unet.train()  # diffusers checkpoints only in training mode; Stable Diffusion UNets have no dropout
    return adapters


class _Objective:
    """The loss of one step: teacher, EMA target, then the student, whose adapter stays in use for the backward pass."""

    def __init__(
        self,
        latents: LatentCache,
        model: Teacher,
        adapters: AdaptedUNet,
        config: StageConfig,
        grid: Tensor,
        bounds: Tensor,
        device: torch.device,
    ) -> None:
        self.data, self.config, self.grid, self.bounds, self.device = latents.split("train"), config, grid, bounds, device
        self.schedule, self.prediction_type = model.schedule, model.prediction_type
        self.solver = adapters.denoiser("previous" if config.teacher == "previous_stage" else None)
        self.student, self.ema = adapters.denoiser("student"), adapters.denoiser("ema")
        self.batch = config.loop.batch_size // config.loop.accumulate

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        picks = torch.randint(len(self.data), (self.batch,), generator=generator)
        x0 = self.data.sample(picks, generator)
        cond = self.data.conditioning(picks, generator).to(self.device)
        z = tscd.offset_noise(tuple(x0.shape), self.config.offset_noise, generator)
        times = tscd.sample_timesteps(self.batch, self.grid, self.bounds, generator)
        low, high = self.config.guidance
        guidance = low + (high - low) * torch.rand(self.batch, generator=generator)
        times = tscd.Timesteps(*(t.to(self.device) for t in (times.t_n, times.t_prev, times.t_b, times.t_end)))
        x_tn = tscd.noisy_input(x0.to(self.device), z.to(self.device), times.t_n, self.schedule)
        prediction = (self.schedule, self.prediction_type)
        if self.config.teacher == "base":
            uncond = self.data.unconditional(self.batch, None if cond.time_ids is None else cond.time_ids).to(self.device)
            xhat = tscd.solver_step(self.solver, x_tn, times, cond, *prediction, uncond=uncond, guidance=guidance.to(self.device))
        else:
            xhat = tscd.solver_step(self.solver, x_tn, times, cond, *prediction)
        target = tscd.consistency_target(self.ema, xhat, times, cond, *prediction)
        loss = tscd.mse(tscd.jump(self.student, x_tn, times.t_n, times.t_end, cond, *prediction), target)
        return loss, {}


def _teacher_key(model: Teacher) -> list[object]:
    return [model.content_hash("unet"), model.prediction_type, model.config.dtype, model.scheduler_config()]


def _lora_key(lora: LoRA | None) -> str | None:
    if lora is None:
        return None
    return fingerprint({k: [float(v.double().sum()), float(v.double().square().sum())] for k, v in lora.tensors.items()})


def _metadata(config: StageConfig, model: Teacher, latents: LatentCache) -> dict[str, str]:
    scheduler = model.scheduler_config()
    return {
        "method": f"TSCD, {config.segments} segments (arXiv 2404.13686)",
        "segments": str(config.segments),
        "teacher": model.config.source,
        "teacher_unet_sha256": model.content_hash("unet"),
        "data_key": latents.key,
        "data_rows": latents.parts["rows"],
        "sampling_contract": sampling_contract(config.segments, scheduler, model.prediction_type),
    }
