"""Wiring of the dedicated one-step UNet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.pipeline import Node, Pipeline
from PIL import Image

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.evaluation.bench import Metrics, evaluate_unet
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.nodes import EVALUATION, HANDLES, pairs_node
from hypersd_pipeline.recipes.one_step import choose_start, train_unet
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import OneStepConfig
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.loop import MetricSink
from hypersd_pipeline.training.processes import Place


def unet_node(
    latents: LatentCache,
    teacher: TeacherConfig,
    stage: OneStepConfig,
    pairs: Path,
    checkpoints: CheckpointStore,
    metric_stream: MetricSink,
    compute: ComputeConfig,
    start: LoRA,
) -> tuple[Callable[[Path], None], dict[str, float]]:
    """See `recipes.one_step.train_unet`."""
    return train_unet(latents, teacher, stage, pairs, Outputs(checkpoints, metric_stream, compute), start)


def evaluate_unet_node(
    unet: Path, teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig, checkpoints: CheckpointStore, compute: ComputeConfig
) -> tuple[Metrics, Image.Image, Callable[[Path], None]]:
    """See `evaluation.bench.evaluate_unet`."""
    return evaluate_unet(unet, teacher, reference, evaluation, Place(checkpoints.path, compute))


def create_pipeline(**_: Any) -> Pipeline:
    """``lora_k1`` and ``lora_feedback`` -> ``one_step_unet`` and its metrics."""
    shared = {"latents": "latents", "teacher": "params:teacher", "stage": "params:stage", "start": "start"}
    return Pipeline(
        [
            Node(choose_start, ["distilled", "feedback_lora", "params:stage"], "start", name="start"),
            Node(pairs_node, {**shared, **HANDLES}, "pairs", name="pairs"),
            Node(unet_node, {**shared, "pairs": "pairs", **HANDLES}, ["unet", "report"], name="train"),
            Node(evaluate_unet_node, {"unet": "unet", **EVALUATION}, ["metrics", "grid", "samples"], name="evaluate"),
        ],
        namespace="one_step_unet",
        parameters={"params:teacher", "params:evaluation", "params:compute"},
        inputs={
            "latents": "latents", "evaluation_reference": "evaluation_reference", "distilled": "lora_k1", "feedback_lora": "lora_feedback",
        },
        outputs={"unet": "one_step_unet", **{kind: f"{kind}_unet" for kind in ("report", "metrics", "grid", "samples")}},
    )  # fmt: skip
