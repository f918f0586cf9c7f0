"""Wiring of the replicates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.experiments.cells import ReplicatesConfig, plan_replicates
from hypersd_pipeline.experiments.chain import Setting, run_cells
from hypersd_pipeline.experiments.report import feedback_table, report
from hypersd_pipeline.io.records import RecordStore
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.nodes import reference_node
from hypersd_pipeline.recipes.feedback import AnnotatedData
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.distributed import ComputeConfig

INPUTS = {
    "manifest": "manifest",
    "data": "params:data",
    "latents": "latents",
    "teacher": "params:teacher",
    "reference": "evaluation_reference",
    "evaluation": "params:evaluation",
    "replicates": "params:replicates",
    "checkpoints": "replicates.checkpoints",
    "records": "replicates_records",
    "compute": "params:compute",
}


def replicates_node(
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    teacher: TeacherConfig,
    reference: Path,
    evaluation: EvaluationConfig,
    replicates: ReplicatesConfig,
    checkpoints: CheckpointStore,
    records: RecordStore,
    compute: ComputeConfig,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Run the chain once per seed. See `experiments.chain.run_cells`."""
    setting = Setting(AnnotatedData(manifest, data, latents), teacher, reference, evaluation, checkpoints, records, compute)
    return run_cells(plan_replicates(replicates), replicates.seeds, setting)


def create_pipeline(**_: Any) -> Pipeline:
    """``latents``, ``manifest`` and ``params:replicates`` -> ``replicates_metrics``, ``replicates_table``, ``replicates_plot``."""
    return Pipeline(
        [
            reference_node(),
            Node(replicates_node, INPUTS, ["replicates_metrics", "replicates_feedback"], name="run_replicates"),
            Node(feedback_table, "replicates_feedback", "replicates_feedback_table", name="report_feedback"),
            Node(report, "replicates_metrics", ["replicates_table", "replicates_plot"], name="report_replicates"),
        ]
    )
