"""Wiring of the ablation."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.pipelines import evaluation
from hypersd_pipeline.pipelines.ablation.nodes import plan_cells, run_cells
from hypersd_pipeline.pipelines.ablation.report import report
from hypersd_pipeline.pipelines.tscd.pipeline import SEGMENTS


def create_pipeline(**_: Any) -> Pipeline:
    """``latents``, ``manifest`` and the stages' parameters -> ``ablation_figures``, ``ablation_table``, ``ablation_plot``."""
    stages = {f"k{k}": f"params:tscd_k{k}.stage" for k in SEGMENTS}
    stages |= {name: f"params:baseline_{name}.stage" for name in ("lcm", "tcd", "pcm", *(f"progressive_k{k}" for k in SEGMENTS))}
    stages |= {"unified": "params:dmd.stage", "dmd2": "params:baseline_dmd2.stage", "dmd": "params:baseline_dmd.stage"}
    run = {
        "cells": "ablation_cells",
        "ablation": "params:ablation",
        "latents": "latents",
        "teacher": "params:teacher",
        "reference": "evaluation_reference",
        "evaluation": "params:evaluation",
        "checkpoints": "ablation.checkpoints",
        "records": "ablation_records",
    }
    nodes = [
        Node(plan_cells, {"ablation": "params:ablation", "defaults": "params:tscd", **stages}, "ablation_cells", name="plan_ablation"),
        Node(run_cells, run, "ablation_figures", name="run_ablation"),
        Node(report, "ablation_figures", ["ablation_table", "ablation_plot"], name="report_ablation"),
    ]
    return evaluation.create_pipeline().only_nodes("prepare_reference") + Pipeline(nodes)
