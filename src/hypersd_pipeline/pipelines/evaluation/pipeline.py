"""Wiring of the evaluation. The stages' own evaluation is in their pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.pipeline import Node, Pipeline
from PIL import Image

from hypersd_pipeline.evaluation.bench import Metrics, evaluate_teacher
from hypersd_pipeline.evaluation.results import MODELS, summarise_models
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.nodes import EVALUATION, reference_node
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.processes import Place


def evaluate_teacher_node(
    teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig, checkpoints: CheckpointStore, compute: ComputeConfig
) -> tuple[Metrics, Image.Image, Callable[[Path], None]]:
    """See `evaluation.bench.evaluate_teacher`."""
    return evaluate_teacher(teacher, reference, evaluation, Place(checkpoints.path, compute))


def create_pipeline(**_: Any) -> Pipeline:
    """``manifest``, and metrics, reports and samples of every stage -> ``evaluation_reference``, the teacher's metrics, ``results_*``."""
    stages = {f"{kind}_{model}": f"{kind}_{model}" for kind in ("metrics", "report") for model in MODELS}
    stages |= {f"samples_{model}": f"samples_{model}" for model in MODELS if model != "feedback"}  # whose grid is by weight
    shared = {name: name for name in ("teacher_metrics", "teacher_samples")}
    return Pipeline(
        [
            reference_node(),
            Node(
                evaluate_teacher_node,
                {**EVALUATION, "checkpoints": "evaluation.checkpoints"},
                ["teacher_metrics", "teacher_grid", "teacher_samples"],
                name="evaluate_teacher",
            ),
            Node(
                summarise_models,
                {"reference": "evaluation_reference", "evaluation": "params:evaluation", **shared, **stages},
                ["results_table", "results_lines", "results", "results_by_model", "results_grid"],
                name="summarise",
            ),
        ]
    )
