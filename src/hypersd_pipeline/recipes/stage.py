"""What all recipes of a stage have in common: the context of its terms, its key, its cost, and the call of the loop."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.trajectories import NoisePairs, noise_pairs_key, read_noise_pairs
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.files import content_hashes
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.backbones import Backbone
from hypersd_pipeline.models.lora import LoRA, lora_key
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.checkpoints import CheckpointStore, Identity
from hypersd_pipeline.training.config import StageConfig, changed
from hypersd_pipeline.training.cost import measure_forward, with_cost
from hypersd_pipeline.training.decoding import decoded_one_by_one
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.loop import MetricSink, Stateful, train
from hypersd_pipeline.training.stage import Stage, build_stage
from hypersd_pipeline.training.terms import Context, RegressionConfig


@dataclass(frozen=True)
class Outputs:
    """Where a training leaves its checkpoints and its live metrics, and how many processes it is to have. None: this one."""

    checkpoints: CheckpointStore
    metrics: MetricSink
    compute: ComputeConfig | None = None


def load_for(config: StageConfig, teacher: TeacherConfig, latents: LatentCache, accelerator: Accelerator) -> Teacher:
    """The parts of the teacher that a stage needs, checked against the cache and the stage.

    Raises:
        UserError: the cache was made by another teacher, or a timestep is not in the teacher's schedule.
    """
    parts = ("backbone", "vae") if config.needs_images else ("backbone",)
    model = load_teacher(teacher, parts=parts, device=accelerator.device)  # type: ignore[arg-type]
    latents.require_teacher(model)
    config.check(model.process)
    return model


def hold_frozen(backbone: Backbone, config: StageConfig) -> None:
    """Hold the frozen network in the dtype and the layout that the stage asks for: before adapters are put on it, and after all merging."""
    if config.loop.mixed_precision == "bf16":
        backbone.hold_in(torch.bfloat16)
    if config.loop.channels_last:
        backbone.lay_out_channels_last()


def context_of(
    config: StageConfig, model: Teacher, adapters: AdaptedBackbone, latents: LatentCache, student: Denoiser, **more: Any
) -> Context:
    """What the stage's terms are built from. ``more`` overrides single attributes of `Context`."""
    decode: Callable[[Tensor], Tensor] | None = None
    if config.needs_images:
        plain = functools.partial(model.decode, clip=False)
        decode = functools.partial(decoded_one_by_one, plain) if config.decode_checkpointing else plain
    judge, consistency = config.adversarial, config.consistency
    on_trajectory = judge is not None and config.place_of(judge) == "trajectory"
    rows = latents.split("train")
    context = Context(
        adapters,
        student,
        adapters.denoiser(None),
        rows,
        min(rows.bucket_shapes, key=lambda shape: min(shape[1:]), default=model.latent_shape),
        batch=distributed.share("stage.loop.batch_size / accumulate", config.loop.batch_size // config.loop.accumulate),
        device=model.device,
        passes=config.loop.accumulate,
        seed=config.loop.seed,
        segments=consistency.segments if consistency is not None and on_trajectory else 1,
        decode=decode,
    )
    return replace(context, **more)


def stored_pairs(config: StageConfig, folder: Path, latents: LatentCache, model: Teacher, start: LoRA | None) -> NoisePairs | None:
    """The pairs of the regression term, where there is one.

    Raises:
        UserError: they are missing, or were made with something else.
    """
    regression = config.one(RegressionConfig)
    return None if regression is None else read_noise_pairs(folder, noise_pairs_key(regression.pairs, latents, model, start))


def stage_identity(config: StageConfig, model: Teacher, latents: LatentCache, start: LoRA | None, recipe: str) -> Identity:
    """All that the stage's weights depend on: its checkpoints are kept under it."""
    teacher = {"weights": model.content_hash("backbone"), "dtype": model.config.dtype, "scheduler": model.scheduler_config()}
    return Identity(
        {
            **config.identity(),
            "recipe": recipe,
            "judges": content_hashes(config.judge_files()),
            "data": latents.key,
            "teacher": teacher,
            "start": lora_key(start),
        }
    )


def run_stage(
    name: str,
    config: StageConfig,
    context: Context,
    outputs: Outputs,
    accelerator: Accelerator,
    *,
    parameters: list[nn.Parameter],
    identity: Identity,
    state: Mapping[str, Stateful],
    after_update: Callable[[], None] = lambda: None,
    ready: Callable[[], None] = lambda: None,
    finished: Callable[[int], bool] = lambda step: False,
    full: bool = False,
    built: Callable[[Stage], None] = lambda stage: None,
) -> dict[str, float]:
    """Build the stage and run the loop.

    Args:
        parameters: what is trained. identity: see `stage_identity`. state: the student, for checkpoints.
        ready: see `Stage`. finished: see `train`.
        full: all weights of the student are trained, not a LoRA.
        built: called with the stage before it is trained.

    Returns:
        The loop's report, with the cost of a step in forward passes (`with_cost`).
    """
    stage = build_stage(shared(config), context, ready)
    built(stage)
    if config.loop.compile:
        context.adapters.backbone.compile()
    on_gpu = context.device.type == "cuda"
    ahead = stage.drawing_ahead(context.device) if config.loop.prefetch or (config.loop.prefetch is None and on_gpu) else nullcontext()
    constants = _forward_cost(stage, context, accelerator)
    give_back_freed()
    with ahead:
        report = train(
            name,
            parameters=parameters,
            loss_fn=stage,
            config=config.loop,
            state={**state, **stage.state()},
            key=identity,
            checkpoints=outputs.checkpoints,
            metrics=outputs.metrics,
            accelerator=accelerator,
            after_update=after_update,
            companions=stage.companions(),
            watch=stage.watch,
            will_log=stage.observe,
            constants=constants,
            finished=finished,
        )
    return with_cost(report, config, full=full)


def give_back_freed() -> None:
    """Give memory that was freed back to the machine, where the C library can (glibc).

    It keeps what is smaller than 32 MB. After a large network was loaded and converted that is gigabytes in each process.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def shared(config: StageConfig, among: int | None = None) -> StageConfig:
    """The stage as one of several processes builds it: each term with its share of the samples of a pass.

    Args:
        among: how many processes there are to be. None: as there are.

    Raises:
        UserError: the processes cannot have equal shares.
    """
    distributed.share("stage.loop.batch_size / accumulate", config.loop.batch_size // config.loop.accumulate, among)
    batches = {name: batch for name, term in config.active().items() if (batch := getattr(term, "batch", None)) is not None}
    parts = {name: {"batch": distributed.share(f"stage.terms.{name}.batch", batch, among)} for name, batch in batches.items()}
    return config if all(part["batch"] == batches[name] for name, part in parts.items()) else changed(config, terms=parts)


def _forward_cost(stage: Stage, context: Context, accelerator: Accelerator) -> Mapping[str, float]:
    """F and the encoder's share of it, on rows of the training split."""
    rows = torch.arange(context.batch) % len(context.data)
    x, cond = (
        torch.randn(context.batch, *context.data.latent_shape, generator=torch.Generator().manual_seed(0)),
        context.data.conditioning(rows),
    )
    return measure_forward(context.adapters, x.to(context.device), cond.to(context.device), accelerator.autocast)


def provenance(model: Teacher, latents: LatentCache, method: str) -> dict[str, str]:
    """Metadata of what is trained: method, teacher and data."""
    return {
        "method": method,
        "teacher": model.config.source,
        "teacher_unet_sha256": model.content_hash("backbone"),
        "data_key": latents.key,
        "data_rows": latents.parts["rows"],
    }
