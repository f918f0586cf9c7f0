"""One step by distribution matching: the unified LoRA for 1 to 8 steps, and the dedicated one-step UNet (Hyper-SD section 3.3)."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

from torch import nn

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.trajectories import make_noise_pairs, walk_noise_pairs
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.backbones import Backbone
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA, combine, merge_lora
from hypersd_pipeline.models.one_step import write_network
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.recipes.launch import on_ranks
from hypersd_pipeline.recipes.stage import Outputs, context_of, hold_frozen, load_for, provenance, run_stage, stage_identity, stored_pairs
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.config import OneStepConfig
from hypersd_pipeline.training.critic import CRITIC
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import make_accelerator
from hypersd_pipeline.training.terms import MatchingConfig

METHOD = "distribution matching (Hyper-SD, arXiv 2404.13686, section 3.3)"


def choose_start(lora: LoRA, feedback_lora: LoRA, stage: OneStepConfig) -> LoRA:
    """The LoRA that the one-step stages start from: the distilled one plus ``feedback_weight`` times the feedback LoRA."""
    return combine(lora, feedback_lora, stage.feedback_weight, stage.start_rank) if stage.feedback_weight else lora


def _critic_rank(stage: OneStepConfig) -> dict[str, int]:
    """The critic's rank, where it is not the student's."""
    matching = stage.one(MatchingConfig)
    return {} if matching is None or matching.critic.rank is None else {CRITIC: matching.critic.rank}


def make_pairs(
    latents: LatentCache, teacher: TeacherConfig, stage: OneStepConfig, outputs: Outputs, start: LoRA | None = None
) -> Callable[[Path], None]:
    """A writer of the pairs of a stage's regression (see `make_noise_pairs`).

    Args:
        outputs: an interrupted walk goes on from what is beside the stage's checkpoints.

    Raises:
        UserError: the teacher's schedule does not have the stage's timestep. That is said before the walks, which may take hours.
    """
    stage.check(load_teacher(teacher, parts=()).process)
    walk = functools.partial(walk_pairs, latents, teacher, stage, outputs, start)
    return make_noise_pairs(latents, teacher, stage.pairs, start, _walked(outputs), walk)


@on_ranks
def walk_pairs(latents: LatentCache, teacher: TeacherConfig, stage: OneStepConfig, outputs: Outputs, start: LoRA | None = None) -> None:
    """Make what is missing of a stage's pairs, beside its checkpoints. Each process walks from the noise of its batches."""
    assert stage.pairs is not None
    walk_noise_pairs(latents, teacher, stage.pairs, start, _walked(outputs), distributed.mine)


def _walked(outputs: Outputs) -> Path:
    return outputs.checkpoints.path / "pairs"


@on_ranks
def train_unified(
    latents: LatentCache, teacher: TeacherConfig, stage: OneStepConfig, pairs: Path, outputs: Outputs, start: LoRA | None = None
) -> tuple[LoRA, dict[str, float]]:
    """Train the unified LoRA: one step by distribution matching, the others kept by the consistency term.

    Teacher, student, average and critic are one network and three adapters.

    Args:
        pairs: see `make_pairs`. start: see `choose_start`.

    Returns:
        The averaged LoRA with its sampling contract, and the loop's report with the cost of a step in forward passes.

    Raises:
        UserError: weights of a reward are missing, the pairs or the cache were made with something else, or ``start`` has further modules.
    """
    accelerator = make_accelerator(stage.loop)
    model = load_for(stage, teacher, latents, accelerator)
    adapters = unified_adapters(model, stage, start)
    student, ema = adapters.parameters("student"), adapters.parameters("ema")
    stored = stored_pairs(stage, pairs, latents, model, start)
    report = run_stage(
        "unified",
        stage,
        context_of(stage, model, adapters, latents, adapters.denoiser("student"), pairs=stored),
        outputs,
        accelerator,
        parameters=student,
        identity=stage_identity(stage, model, latents, start, "unified"),
        state={"adapters": adapters},
        after_update=lambda: ema_update(ema, student, stage.ema_decay),
        ready=lambda: adapters.use("student"),
    )
    contract = Contract(1, stage.sampling.eta, "tcd", one_step_timestep=_told(stage, model))
    metadata = {**provenance(model, latents, METHOD), "sampling_contract": contract.to_json(model.scheduler_config())}
    return adapters.export("ema", metadata), report


def unified_adapters(model: Teacher, stage: OneStepConfig, start: LoRA | None, rank: int | None = None) -> AdaptedBackbone:
    """Student, average and critic on one network.

    Args:
        rank: of a LoRA to start from that is not there yet. None: that of ``start``, or else the stage's.
    """
    hold_frozen(model.backbone, stage)
    adapters = AdaptedBackbone(
        model.backbone,
        model.process,
        rank=rank or (start.rank if start else stage.lora.rank),
        target_modules=tuple(start.modules()) if start else stage.lora.target_modules,
        trainable=("student", CRITIC),
        start=start,
        fresh_names=(CRITIC,),
        ranks=_critic_rank(stage),
        seed=stage.loop.seed,
    )
    if stage.gradient_checkpointing:
        model.backbone.checkpoint_gradients()
    return adapters


def _told(stage: OneStepConfig, model: Teacher) -> int | None:
    """The timestep of the contract, which names it only where it is not T - 1."""
    told = stage.sample.timestep
    return None if told == model.process.last_timestep else told


@on_ranks
def train_unet(
    latents: LatentCache, teacher: TeacherConfig, stage: OneStepConfig, pairs: Path, outputs: Outputs, start: LoRA | None = None
) -> tuple[Callable[[Path], None], dict[str, float]]:
    """Train every weight of a network for one step from ``sample.timestep``. Teacher and critic are a second, frozen one and an adapter.

    Returns:
        A writer of the network's folder for diffusers, and the report.

    Raises:
        UserError: as `train_unified`.
    """
    accelerator = make_accelerator(stage.loop)
    model = load_for(stage, teacher, latents, accelerator)
    backbone, average, adapters = unet_networks(model, stage, start)
    student = backbone.module
    sources, targets = list(student.parameters()), list(average.parameters())
    stored = stored_pairs(stage, pairs, latents, model, start)
    report = run_stage(
        "one-step UNet",
        stage,
        context_of(stage, model, adapters, latents, Denoiser(backbone, model.process), pairs=stored),
        outputs,
        accelerator,
        parameters=sources,
        identity=stage_identity(stage, model, latents, start, "one-step UNet"),
        state={"adapters": adapters, "student": student, "average": average},
        after_update=lambda: ema_update(targets, sources, stage.ema_decay),
        full=True,
    )
    told = model.process.last_timestep if stage.sample.timestep is None else stage.sample.timestep
    contract = json.loads(Contract(1, only_timestep=told).to_json(model.scheduler_config()))
    network, metadata = type(model.backbone)(average), provenance(model, latents, METHOD)
    return functools.partial(write_network, network=network, contract=contract, metadata=metadata), report


def unet_networks(model: Teacher, stage: OneStepConfig, start: LoRA | None) -> tuple[Backbone, nn.Module, AdaptedBackbone]:
    """The student, its average, and the teacher with the critic."""
    student = copy.deepcopy(model.backbone.module).float().requires_grad_(True)  # in bf16 a LoRA, or an update of 1e-6, would round away
    if start is not None:
        merge_lora(student, start)
    average = copy.deepcopy(student).requires_grad_(False)
    if stage.ema_on_cpu:
        average.cpu()
    hold_frozen(model.backbone, stage)
    adapters = AdaptedBackbone(
        model.backbone,
        model.process,
        rank=_critic_rank(stage).get(CRITIC, stage.lora.rank),
        target_modules=stage.lora.target_modules,
        names=(CRITIC,),
        trainable=(CRITIC,),
        seed=stage.loop.seed,
    )
    backbone = type(model.backbone)(student)
    if stage.loop.channels_last:
        backbone.lay_out_channels_last()
    if stage.loop.compile:
        backbone.compile()
    for network in (backbone, model.backbone) if stage.gradient_checkpointing else ():
        network.checkpoint_gradients()
    return backbone, average, adapters
