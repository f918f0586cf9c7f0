"""Nodes that several pipelines share: each calls a recipe or an evaluation with what the catalog gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from kedro.pipeline import Node, Pipeline
from PIL import Image

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.evaluation.bench import Metrics, evaluate_lora, prepare_reference
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes.distil import distil
from hypersd_pipeline.recipes.one_step import make_pairs, train_unified
from hypersd_pipeline.recipes.prepare import cache_latents, generate_dataset, validate_rows
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig, StageConfig
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.loop import MetricSink
from hypersd_pipeline.training.processes import Place

HANDLES = {"checkpoints": "checkpoints", "metric_stream": "metric_stream", "compute": "params:compute"}
"""Where a training continues, where its live metrics go, both in the stage's namespace, and on how many processes it runs."""

EVALUATION = {
    "teacher": "params:teacher",
    "reference": "evaluation_reference",
    "evaluation": "params:evaluation",
    "checkpoints": "checkpoints",
    "compute": "params:compute",
}
"""What every evaluation of a model reads besides the model. Its processes meet beside the stage's checkpoints."""


def data_nodes() -> list[Node]:
    """``params:data``, ``params:teacher`` -> ``dataset``, ``manifest``, ``rejected_rows``, ``latents``. What is there is kept."""
    place = {"checkpoints": "data_prep.checkpoints", "compute": "params:compute"}
    validated = {"dataset": "dataset", "data": "params:data", "teacher": "params:teacher", "latents": "latents.checkpoints", **place}
    cached = {"manifest": "manifest", "data": "params:data", "teacher": "params:teacher", **place}
    return [
        Node(generate_dataset, "params:data", "dataset", name="generate_dataset"),
        Node(validate_node, validated, ["manifest", "rejected_rows"], name="validate_rows"),
        Node(cache_node, cached, "latents", name="cache_latents"),
    ]


def validate_node(
    dataset: Path,
    data: DataConfig,
    teacher: TeacherConfig,
    latents: CheckpointStore,
    checkpoints: CheckpointStore,
    compute: ComputeConfig,
) -> tuple[Manifest, pd.DataFrame]:
    """See `recipes.prepare.validate_rows`. ``latents`` is the folder of the cache, whatever is in it."""
    return validate_rows(dataset, data, Place(checkpoints.path, compute), teacher, latents.path)


def cache_node(
    manifest: Manifest, data: DataConfig, teacher: TeacherConfig, checkpoints: CheckpointStore, compute: ComputeConfig
) -> Callable[[Path], None]:
    """See `recipes.prepare.cache_latents`."""
    return cache_latents(manifest, data, teacher, Place(checkpoints.path, compute))


STAGES = ("tscd_k8", "tscd_k4", "tscd_k2", "tscd_k1", "feedback", "dmd", "one_step_unet")
"""The stages of the main job, in order."""


def all_stages(
    tscd_k8: StageConfig,
    tscd_k4: StageConfig,
    tscd_k2: StageConfig,
    tscd_k1: StageConfig,
    feedback: FeedbackConfig,
    dmd: OneStepConfig,
    one_step_unet: OneStepConfig,
) -> dict[str, StageConfig]:
    """The stages of an environment by name, each of the class that it is validated as."""
    return dict(zip(STAGES, (tscd_k8, tscd_k4, tscd_k2, tscd_k1, feedback, dmd, one_step_unet), strict=True))


def stages_node() -> Node:
    """What looks at all stages before any of them runs reads ``stages``."""
    return Node(all_stages, {stage: f"params:{stage}.stage" for stage in STAGES}, "stages", name="stages")


def reference_node() -> Node:
    """The prompts and features that every evaluation compares with. One for all pipelines."""
    inputs = {name: EVALUATION[name] for name in ("teacher", "evaluation", "compute")}
    handles = {"manifest": "manifest", "checkpoints": "evaluation.checkpoints"}
    return Node(reference_of_data_node, {**inputs, **handles}, "evaluation_reference", name="prepare_reference")


def reference_of_data_node(
    manifest: Manifest, teacher: TeacherConfig, evaluation: EvaluationConfig, checkpoints: CheckpointStore, compute: ComputeConfig
) -> Callable[[Path], None]:
    """See `evaluation.bench.prepare_reference`."""
    return prepare_reference(manifest, teacher, evaluation, Place(checkpoints.path, compute))


def evaluate_node(
    lora: LoRA, teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig, checkpoints: CheckpointStore, compute: ComputeConfig
) -> tuple[Metrics, Image.Image, Callable[[Path], None]]:
    """See `evaluation.bench.evaluate_lora`."""
    return evaluate_lora(lora, teacher, reference, evaluation, Place(checkpoints.path, compute))


def distil_node(
    latents: LatentCache,
    teacher: TeacherConfig,
    stage: StageConfig,
    checkpoints: CheckpointStore,
    metric_stream: MetricSink,
    compute: ComputeConfig,
    previous: LoRA | None = None,
) -> tuple[LoRA, dict[str, float]]:
    """See `recipes.distil.distil`."""
    return distil(latents, teacher, stage, Outputs(checkpoints, metric_stream, compute), previous)


def pairs_node(
    latents: LatentCache,
    teacher: TeacherConfig,
    stage: OneStepConfig,
    checkpoints: CheckpointStore,
    metric_stream: MetricSink,
    compute: ComputeConfig,
    start: LoRA | None = None,
) -> Callable[[Path], None]:
    """See `recipes.one_step.make_pairs`."""
    return make_pairs(latents, teacher, stage, Outputs(checkpoints, metric_stream, compute), start)


def unified_node(
    latents: LatentCache,
    teacher: TeacherConfig,
    stage: OneStepConfig,
    pairs: Path,
    checkpoints: CheckpointStore,
    metric_stream: MetricSink,
    compute: ComputeConfig,
    start: LoRA | None = None,
) -> tuple[LoRA, dict[str, float]]:
    """See `recipes.one_step.train_unified`."""
    return train_unified(latents, teacher, stage, pairs, Outputs(checkpoints, metric_stream, compute), start)


def distil_pipeline(namespace: str, name: str, previous: str | None = None, tags: str | None = None) -> Pipeline:
    """Train and evaluate one stage of consistency distillation, starting from the LoRA of the stage ``previous``.

    Everything inside is in the namespace (``tscd_k8.metric_stream``, ``params:tscd_k8.stage``). The outputs are flat: ``lora_<name>``,
    ``report_<name>``, ``metrics_<name>``, ``grid_<name>``, ``samples_<name>``.
    """
    start = {"previous": "previous"} if previous else {}
    train = {"latents": "latents", "teacher": "params:teacher", "stage": "params:stage", **HANDLES, **start}
    nodes = [
        Node(distil_node, train, ["lora", "report"], name="train"),
        Node(evaluate_node, {"lora": "lora", **EVALUATION}, ["metrics", "grid", "samples"], name="evaluate"),
    ]
    return _staged(nodes, namespace, name, {"previous": f"lora_{previous}"} if previous else {}, tags)


def unified_pipeline(namespace: str, name: str, before: list[Node], inputs: dict[str, str], tags: str | None = None) -> Pipeline:
    """Make the pairs, train and evaluate a unified LoRA.

    Args:
        before: the node that makes ``start``, or none, to start from the teacher. inputs: what that node reads.
    """
    start = {"start": "start"} if before else {}
    shared = {"latents": "latents", "teacher": "params:teacher", "stage": "params:stage", **start}
    nodes = [
        *before,
        Node(pairs_node, {**shared, **HANDLES}, "pairs", name="pairs"),
        Node(unified_node, {**shared, "pairs": "pairs", **HANDLES}, ["lora", "report"], name="train"),
        Node(evaluate_node, {"lora": "lora", **EVALUATION}, ["metrics", "grid", "samples"], name="evaluate"),
    ]
    return _staged(nodes, namespace, name, inputs, tags)


def _staged(nodes: list[Node], namespace: str, name: str, inputs: dict[str, str], tags: Any) -> Pipeline:
    return Pipeline(
        nodes,
        namespace=namespace,
        parameters={"params:teacher", "params:evaluation", "params:compute"},
        inputs={"latents": "latents", "evaluation_reference": "evaluation_reference", **inputs},
        outputs={kind: f"{kind}_{name}" for kind in ("lora", "report", "metrics", "grid", "samples")},
        tags=tags,
    )
