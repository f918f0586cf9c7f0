"""Wiring of the evaluation. The stages' own evaluation is in their pipeline (``tscd``)."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.pipelines.evaluation.nodes import MODELS, evaluate_teacher, prepare_reference, summarise


def create_pipeline(**_: Any) -> Pipeline:
    """``manifest``, and metrics and samples of every stage -> ``evaluation_reference``, teacher's figures, ``results_*``."""
    teacher = {"teacher": "params:teacher", "reference": "evaluation_reference", "evaluation": "params:evaluation"}
    stages = {f"metrics_{model}": f"metrics_{model}" for model in MODELS}
    stages |= {f"samples_{model}": f"samples_{model}" for model in MODELS if model != "feedback"}  # whose grid is by weight
    shared = {name: name for name in ("teacher_metrics", "teacher_samples")}
    return Pipeline(
        [
            Node(prepare_reference, ["manifest", "params:teacher", "params:evaluation"], "evaluation_reference", name="prepare_reference"),
            Node(evaluate_teacher, teacher, ["teacher_metrics", "teacher_grid", "teacher_samples"], name="evaluate_teacher"),
            Node(
                summarise,
                {"reference": "evaluation_reference", "evaluation": "params:evaluation", **shared, **stages},
                ["results_table", "results_figures", "results", "results_grid"],
                name="summarise",
            ),
        ]
    )
