"""Wiring of the replicates."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.pipelines import evaluation
from hypersd_pipeline.pipelines.ablation.report import report
from hypersd_pipeline.pipelines.replicates.nodes import feedback_table, run_replicates
from hypersd_pipeline.pipelines.tscd.pipeline import SEGMENTS


def create_pipeline(**_: Any) -> Pipeline:
    """``latents``, ``manifest`` and the stages' parameters -> ``replicates_figures``, ``replicates_table``, ``replicates_plot``."""
    inputs = {
        "replicates": "params:replicates",
        "defaults": "params:tscd",
        **{f"k{k}": f"params:tscd_k{k}.stage" for k in SEGMENTS},
        "feedback": "params:feedback.stage",
        "unified": "params:dmd.stage",
        "unet": "params:one_step_unet.stage",
        "manifest": "manifest",
        "data": "params:data",
        "latents": "latents",
        "teacher": "params:teacher",
        "reference": "evaluation_reference",
        "evaluation": "params:evaluation",
        "checkpoints": "replicates.checkpoints",
        "records": "replicates_records",
    }
    nodes = [
        Node(run_replicates, inputs, ["replicates_figures", "replicates_feedback"], name="run_replicates"),
        Node(feedback_table, "replicates_feedback", "replicates_feedback_table", name="report_feedback"),
        Node(report, "replicates_figures", ["replicates_table", "replicates_plot"], name="report_replicates"),
    ]
    return evaluation.create_pipeline().only_nodes("prepare_reference") + Pipeline(nodes)
