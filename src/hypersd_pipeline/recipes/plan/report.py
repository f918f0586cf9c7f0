"""The plan of an environment: memory, hours, cost and disk of its stages on a kind of GPU."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd

from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.public import description
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes.plan.hardware import GIB, PlanConfig
from hypersd_pipeline.recipes.plan.needs import Needs, blank_teacher, form_of, needs_at, preparation, text_widths
from hypersd_pipeline.recipes.stage import shared
from hypersd_pipeline.training.config import StageConfig

log = logging.getLogger(__name__)

GB = 1e9
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_TOKENS = 77
_MOST = 4096  # images of a pass that are counted, for networks so small that any number fits


def make_plan(
    config: PlanConfig, teacher: TeacherConfig, data: DataConfig, judged: int, stages: Mapping[str, StageConfig]
) -> tuple[pd.DataFrame, str]:
    """Plan all stages.

    Args:
        judged: images that the guard of feedback learning makes and judges at a time: ``evaluation.batch_size``.

    Returns:
        A line for each stage: ``stage``, ``parameters_m``, ``trained_m`` (millions), ``static_gb``, ``activations_gb``, ``peak_gb``,
        ``batch`` (images of a pass), ``largest_batch`` (0: not one image), ``fits``, ``hours``, ``dollars``, ``checkpoints_gb``.
        The same and the caches for reading.

    Raises:
        UserError: the architecture is not known, or the processes cannot share a pass.
    """
    told = description(teacher)
    lines = []
    known: dict[str, tuple[Needs, Needs]] = {}
    for key, whole in stages.items():
        stage = shared(whole, config.gpus)
        batch = whole.loop.batch_size // whole.loop.accumulate // config.gpus
        form = form_of(key, stage)
        if form not in known:
            log.info("Plan: %s with %d images a pass", key, batch)
            at, other = needs_at(key, stage, teacher, told, batch, partial(about_the_largest, usable=config.usable), judged)
            known[form] = at, other
        lines.append(_line(key, whole, config, *known[form]))
    table = pd.DataFrame(lines)
    return table, _text(config, teacher, data, told, table)


def about_the_largest(at: Needs, usable: float) -> int:
    """Images of a pass that might just fit, but never as many as were counted already. Its needs tell how good the guess was."""
    guess = math.floor((usable - at.static) / max(at.activations / at.batch, 1.0))
    guess = max(1, min(guess, _MOST))
    return guess if guess != at.batch else guess + 1


def largest_batch(at: Needs, other: Needs, usable: float) -> int:
    """Images of a pass that fit, from the needs of two sizes, between which memory is taken to grow evenly. 0: not one."""
    low, high = sorted((at, other), key=lambda needs: needs.batch)
    each = (high.peak - low.peak) / (high.batch - low.batch)
    return max(0, math.floor(low.batch + (usable - low.peak) / max(each, 1.0)))


def _line(key: str, stage: StageConfig, config: PlanConfig, at: Needs, other: Needs) -> dict[str, Any]:
    hardware, loop = config.hardware, stage.loop
    peak = hardware.bf16_tflops if loop.mixed_precision == "bf16" else hardware.fp32_tflops
    trained = loop.steps * loop.accumulate * at.operations
    prepared = preparation(stage, at) / config.gpus
    hours = (trained + prepared) / (peak * 1e12 * config.utilisation) / 3600
    return {
        "stage": key,
        "parameters_m": round(at.parameters / 1e6, 1),
        "trained_m": round(at.trained / 1e6, 1),
        "static_gb": round(at.static / GB, 2),
        "activations_gb": round(at.activations / GB, 2),
        "peak_gb": round(at.peak / GB, 2),
        "batch": at.batch,
        "largest_batch": largest_batch(at, other, config.usable),
        "fits": at.peak <= config.usable,
        "hours": round(hours, 2),
        "dollars": round(hours * config.gpus * hardware.dollars_an_hour, 2),
        "checkpoints_gb": round(config.checkpoints * at.checkpoint / GB, 2),
    }


def caches_gb(teacher: TeacherConfig, data: DataConfig, told: Mapping[str, Any], images: int) -> tuple[float, float]:
    """Disk of the cached latents (mean and deviation) and of the text embeddings, one caption an image where no number is given."""
    rows = min(images, data.max_images or images)
    channels, height, width = blank_teacher(teacher, told).latent_shape
    width_of_text, pooled = text_widths(told)
    latents = rows * 2 * channels * height * width * _BYTES[data.dtype]
    texts = rows * (data.max_captions or 1) * (_TOKENS * width_of_text + (pooled or 0)) * _BYTES[data.text_dtype]
    return latents / GB, texts / GB


def _text(config: PlanConfig, teacher: TeacherConfig, data: DataConfig, told: Mapping[str, Any], table: pd.DataFrame) -> str:
    hardware = config.hardware
    latents, texts = caches_gb(teacher, data, told, config.images)
    lines = [
        f"# Plan for {config.gpus} x {config.profile}",
        "",
        f"{config.usable / GB:.1f} GB of {hardware.memory_gib * GIB / GB:.1f} GB can be filled. Hours take {config.utilisation:.0%} of the "
        f"peak. {hardware.dollars_an_hour:.2f} dollars an hour for each.",
        "",
        "| " + " | ".join(table.columns) + " |",
        "|" + "-|" * len(table.columns),
        *("| " + " | ".join(str(value) for value in row) + " |" for row in table.itertuples(index=False)),
        "",
        f"All stages: {table['hours'].sum():.1f} hours, {table['dollars'].sum():.0f} dollars, {table['checkpoints_gb'].sum():.1f} GB of "
        "checkpoints. Data preparation and evaluation are not in it.",
        f"Caches of {config.images} images: {latents:.1f} GB of latents and {texts:.1f} GB of text embeddings.",
    ]
    return "\n".join(lines) + "\n"


def require_fit(config: PlanConfig, table: pd.DataFrame) -> None:
    """Raises UserError naming the first stage that does not fit, and the cure."""
    wrong = table[~table["fits"].astype(bool)]
    if len(wrong) and config.refuse:
        first = wrong.iloc[0]
        cure = (
            f"raise {first['stage']}.stage.loop.accumulate until a pass has {first['largest_batch']} images or fewer"
            if first["largest_batch"]
            else "not one image fits: use gradient_checkpointing, teacher.dtype bfloat16, or GPUs with more memory"
        )
        raise UserError(
            f"plan: {first['stage']} needs {first['peak_gb']} GB with {first['batch']} images a pass, and a {config.profile} has "
            f"{config.usable / GB:.1f} GB to fill; {cure}."
        )
