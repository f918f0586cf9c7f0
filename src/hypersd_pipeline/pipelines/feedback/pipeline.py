"""Wiring of feedback learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from kedro.pipeline import Node, Pipeline
from PIL import Image

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.nodes import EVALUATION, HANDLES
from hypersd_pipeline.recipes.feedback import AnnotatedData, merge_feedback, train_feedback
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.recipes.tradeoff import measure_tradeoff
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import FeedbackConfig
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.loop import MetricSink
from hypersd_pipeline.training.processes import Place

SOURCE = "lora_k1"
"""The distilled LoRA that feedback is trained on top of."""


def feedback_node(
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    teacher: TeacherConfig,
    evaluation: EvaluationConfig,
    lora: LoRA,
    stage: FeedbackConfig,
    checkpoints: CheckpointStore,
    metric_stream: MetricSink,
    compute: ComputeConfig,
) -> tuple[LoRA, dict[str, float]]:
    """See `recipes.feedback.train_feedback`."""
    source = AnnotatedData(manifest, data, latents)
    return train_feedback(source, teacher, evaluation, lora, stage, Outputs(checkpoints, metric_stream, compute))


def tradeoff_node(
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    teacher: TeacherConfig,
    reference: Path,
    evaluation: EvaluationConfig,
    lora: LoRA,
    feedback_lora: LoRA,
    stage: FeedbackConfig,
    checkpoints: CheckpointStore,
    compute: ComputeConfig,
) -> tuple[pd.DataFrame, dict[str, Any], Image.Image, Image.Image]:
    """See `recipes.tradeoff.measure_tradeoff`."""
    source, place = AnnotatedData(manifest, data, latents), Place(checkpoints.path, compute)
    return measure_tradeoff(source, teacher, reference, evaluation, lora, feedback_lora, stage, place)


def create_pipeline(**_: Any) -> Pipeline:
    """``lora_k1``, rewards and segmentation model -> ``lora_feedback``, its merges, the trade-off."""
    shared = {name: name for name in ("manifest", "latents", "lora")}
    parameters = {"data": "params:data", "teacher": "params:teacher", "evaluation": "params:evaluation", "stage": "params:stage"}
    return Pipeline(
        [
            Node(feedback_node, {**shared, **parameters, **HANDLES}, ["feedback_lora", "report"], name="train"),
            Node(merge_feedback, {"lora": "lora", "feedback_lora": "feedback_lora", "stage": "params:stage"}, "merged", name="merge"),
            Node(
                tradeoff_node,
                {**shared, **parameters, **EVALUATION, "feedback_lora": "feedback_lora"},
                ["tradeoff", "metrics", "plot", "grid"],
                name="measure",
            ),
        ],
        namespace="feedback",
        parameters={"params:data", "params:teacher", "params:evaluation", "params:compute"},
        inputs={"manifest": "manifest", "latents": "latents", "evaluation_reference": "evaluation_reference", "lora": SOURCE},
        outputs={
            "feedback_lora": "lora_feedback",
            "report": "report_feedback",
            "merged": "merged_feedback",
            "tradeoff": "tradeoff_feedback",
            "metrics": "metrics_feedback",
            "plot": "plot_feedback",
            "grid": "grid_feedback",
        },
    )
