"""Whether the stages of a run fit into this machine, asked before the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.public import count, description
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.recipes.plan.hardware import GIB, PlanConfig
from hypersd_pipeline.recipes.plan.needs import Needs, form_of, needs_of
from hypersd_pipeline.recipes.plan.report import GB
from hypersd_pipeline.recipes.plan.room import free_memory
from hypersd_pipeline.recipes.stage import shared
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.distributed import ComputeConfig

log = logging.getLogger(__name__)

IMPORTS = 0.8 * GB
"""What a process takes that only imports what a training imports. ``baseline`` of the rehearsal measures it."""
_SMALL = 10**8


def require_room(
    config: PlanConfig, teacher: TeacherConfig, compute: ComputeConfig, judged: int, stages: Mapping[str, StageConfig], small: int = _SMALL
) -> None:
    """Count the memory of each stage as the plan does, and compare it with what is free: on the GPU, or in the machine without one.

    A stage whose memory cannot be counted is let through with a warning.

    Args:
        judged: see `make_plan`. stages: those that will be trained, by keys such as ``tscd_k8``.
        small: parameters of a teacher's network up to which nothing is asked. Counting would take longer than it is worth.

    Raises:
        UserError: a stage does not fit.
    """
    found = changed_to_folder(teacher)
    told = description(found)
    if max(count(network) for network in told["networks"].values()) <= small:
        return
    gpu = torch.cuda.is_available()
    free = free_memory(torch.device("cuda") if gpu else None)
    room = max(0.0, free - config.reserved_gib * GIB) * (1 - config.fragmentation) if gpu else free / compute.here
    known: dict[str, Needs] = {}
    for key, whole in stages.items():
        stage = shared(whole, compute.nodes * compute.here)
        form = form_of(key, stage)
        if form not in known:
            log.info("Asking the plan whether %s fits into the memory. plan.refuse=false leaves this out", key)
            batch = whole.loop.batch_size // whole.loop.accumulate // (compute.nodes * compute.here)
            try:
                known[form] = needs_of(key, stage, found, told, batch, judged)
            except Exception as error:  # whatever real code raises on tensors without values: a training may well work
                log.warning(
                    "The memory of %s cannot be counted (%s: %s), so that it is not known whether it fits", key, type(error).__name__, error
                )
                continue
        needs = known[form]
        need = needs.peak if gpu else max(needs.peak, needs.loading) + IMPORTS
        if need > room:
            where = "a GPU" if gpu else "the machine"
            share = f" for each of {compute.here} processes" if not gpu and compute.here > 1 else ""
            raise UserError(
                f"{key}.stage: needs {need / GB:.1f} GB with {needs.batch} images a pass, and {where} has {room / GB:.1f} GB free{share}; "
                "raise loop.accumulate, set gradient_checkpointing, or free memory (plan.refuse=false starts it anyway)."
            )


def changed_to_folder(teacher: TeacherConfig) -> TeacherConfig:
    """The teacher as the folder in which its files are: a repository's own architecture is then known."""
    return teacher if teacher.source == "shipped" else teacher.model_copy(update={"source": str(load_teacher(teacher, parts=()).folder)})
