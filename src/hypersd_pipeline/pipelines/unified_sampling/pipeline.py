"""Wiring."""

from pathlib import Path
from typing import Any

import pandas as pd
from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.evaluation.ways import SamplingWaysConfig, measure_sampling
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.nodes import EVALUATION
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.processes import Place


def sampling_node(
    lora: LoRA,
    teacher: TeacherConfig,
    reference: Path,
    evaluation: EvaluationConfig,
    sampling: SamplingWaysConfig,
    checkpoints: CheckpointStore,
    compute: ComputeConfig,
) -> tuple[pd.DataFrame, str]:
    """See `evaluation.ways.measure_sampling`."""
    return measure_sampling(lora, teacher, reference, evaluation, sampling, Place(checkpoints.path, compute))


def create_pipeline(**_: Any) -> Pipeline:
    """``lora_unified`` -> ``sampling_metrics``, ``sampling_table``."""
    inputs = {"lora": "lora_unified", "sampling": "params:unified_sampling", **EVALUATION, "checkpoints": "unified_sampling.checkpoints"}
    return Pipeline([Node(sampling_node, inputs, ["sampling_metrics", "sampling_table"], name="measure_sampling")])
