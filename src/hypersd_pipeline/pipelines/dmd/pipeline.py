"""Wiring of the unified LoRA's stage."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.pipelines.dmd.nodes import choose_start, train_unified
from hypersd_pipeline.pipelines.dmd.pairs import make_pairs
from hypersd_pipeline.pipelines.evaluation.nodes import evaluate_stage

OUTPUTS = ("lora", "report", "metrics", "grid", "samples")


def unified_pipeline(namespace: str, name: str, *, from_stages: bool) -> Pipeline:
    """Train and evaluate a unified LoRA.

    Args:
        namespace: where its parameters, curve and checkpoints are. name: its outputs are ``lora_<name>`` and so on.
        from_stages: start from ``lora_k1`` with ``lora_feedback``, or else from the teacher.
    """
    start = {"start": "start"} if from_stages else {}
    shared = {"latents": "latents", "teacher": "params:teacher", "stage": "params:stage"}
    nodes = [
        Node(make_pairs, {**shared, **start}, "pairs", name="pairs"),
        Node(
            train_unified,
            {
                **shared,
                **start,
                "defaults": "params:tscd",
                "consistency": "params:tscd_k1.stage",
                "pairs": "pairs",
                "checkpoints": "checkpoints",
                "metric_stream": "metric_stream",
            },
            ["lora", "report"],
            name="train",
        ),
        Node(
            evaluate_stage,
            {"lora": "lora", "teacher": "params:teacher", "reference": "evaluation_reference", "evaluation": "params:evaluation"},
            ["metrics", "grid", "samples"],
            name="evaluate",
        ),
    ]
    inputs = {"latents": "latents", "evaluation_reference": "evaluation_reference"}
    if from_stages:
        nodes.insert(0, Node(choose_start, ["distilled", "feedback_lora", "params:stage"], "start", name="start"))
        inputs |= {"distilled": "lora_k1", "feedback_lora": "lora_feedback"}
    return Pipeline(
        nodes,
        namespace=namespace,
        parameters={"params:teacher", "params:tscd", "params:evaluation", "params:tscd_k1.stage"},
        inputs=inputs,
        outputs={kind: f"{kind}_{name}" for kind in OUTPUTS},
    )


def create_pipeline(**_: Any) -> Pipeline:
    """``lora_k1`` and ``lora_feedback`` -> ``lora_unified`` and its figures."""
    return unified_pipeline("dmd", "unified", from_stages=True)
