"""Wiring of the ablation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from kedro.pipeline import Node, Pipeline
from PIL import Image

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.experiments.cells import AblationConfig, plan
from hypersd_pipeline.experiments.chain import Setting, feedback_lines, run_cells
from hypersd_pipeline.experiments.report import report
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
    "ablation": "params:ablation",
    "checkpoints": "ablation.checkpoints",
    "records": "ablation_records",
    "compute": "params:compute",
}


def ablation_node(
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    teacher: TeacherConfig,
    reference: Path,
    evaluation: EvaluationConfig,
    ablation: AblationConfig,
    checkpoints: CheckpointStore,
    records: RecordStore,
    compute: ComputeConfig,
) -> pd.DataFrame:
    """Plan the cells and run them. See `experiments.chain.run_cells`."""
    setting = Setting(AnnotatedData(manifest, data, latents), teacher, reference, evaluation, checkpoints, records, compute)
    results, tradeoff = run_cells(plan(ablation), ablation.seeds, setting)
    return pd.concat([results, feedback_lines(tradeoff)], ignore_index=True)


def report_node(results: pd.DataFrame, ablation: AblationConfig) -> tuple[str, Image.Image]:
    """Tables and plot. See `experiments.report.report`."""
    return report(results, ablation.compare)


def create_pipeline(**_: Any) -> Pipeline:
    """``latents``, ``manifest`` and ``params:ablation`` -> ``ablation_metrics``, ``ablation_table``, ``ablation_plot``."""
    return Pipeline(
        [
            reference_node(),
            Node(ablation_node, INPUTS, "ablation_metrics", name="run_ablation"),
            Node(report_node, ["ablation_metrics", "params:ablation"], ["ablation_table", "ablation_plot"], name="report_ablation"),
        ]
    )
