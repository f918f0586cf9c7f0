"""Wiring of the compatibility report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes.compatibility.config import CompatibilityConfig
from hypersd_pipeline.recipes.compatibility.measure import measure_compatibility
from hypersd_pipeline.recipes.compatibility.parts import style_scenes, train_parts
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.loop import MetricSink


def parts_node(
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    scenes: Path,
    teacher: TeacherConfig,
    compatibility: CompatibilityConfig,
    checkpoints: CheckpointStore,
    metric_stream: MetricSink,
) -> Callable[[Path], None]:
    """See `recipes.compatibility.parts.train_parts`."""
    return train_parts(manifest, data, latents, scenes, teacher, compatibility, Outputs(checkpoints, metric_stream))


def create_pipeline(**_: Any) -> Pipeline:
    """``lora_unified`` -> what it is combined with, and the report."""
    config = {"teacher": "params:teacher", "compatibility": "params:compatibility"}
    train = {"manifest": "manifest", "data": "params:data", "latents": "latents", "scenes": "scenes", **config}
    handles = {"checkpoints": "checkpoints", "metric_stream": "metric_stream"}
    measure = {"lora": "lora", "manifest": "manifest", "evaluation": "params:evaluation", "parts": "parts", "scenes": "scenes", **config}
    reports = ["table", "lines", "metrics", "grid_controlnets", "grid_bases"]
    return Pipeline(
        [
            Node(style_scenes, "params:compatibility", "scenes", name="scenes"),
            Node(parts_node, {**train, **handles}, "parts", name="train"),
            Node(measure_compatibility, measure, reports, name="measure"),
        ],
        namespace="compatibility",
        parameters={"params:data", "params:teacher", "params:evaluation", "params:compatibility"},
        inputs={"manifest": "manifest", "latents": "latents", "lora": "lora_unified"},
        outputs={name: f"compatibility_{name}" for name in ("scenes", "parts", *reports)},
    )
