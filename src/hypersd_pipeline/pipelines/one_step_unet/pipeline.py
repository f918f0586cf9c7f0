"""Wiring of the dedicated one-step UNet."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.pipelines.dmd.nodes import choose_start, train_unet
from hypersd_pipeline.pipelines.dmd.pairs import make_pairs
from hypersd_pipeline.pipelines.evaluation.nodes import evaluate_unet


def create_pipeline(**_: Any) -> Pipeline:
    """``lora_k1`` and ``lora_feedback`` -> ``one_step_unet`` and its figures."""
    shared = {"latents": "latents", "teacher": "params:teacher", "stage": "params:stage", "start": "start"}
    reference = {"teacher": "params:teacher", "reference": "evaluation_reference", "evaluation": "params:evaluation"}
    return Pipeline(
        [
            Node(choose_start, ["distilled", "feedback_lora", "params:stage"], "start", name="start"),
            Node(make_pairs, shared, "pairs", name="pairs"),
            Node(
                train_unet,
                {**shared, "pairs": "pairs", "checkpoints": "checkpoints", "metric_stream": "metric_stream"},
                ["unet", "report"],
                name="train",
            ),
            Node(evaluate_unet, {"unet": "unet", **reference}, ["metrics", "grid", "samples"], name="evaluate"),
        ],
        namespace="one_step_unet",
        parameters={"params:teacher", "params:evaluation"},
        inputs={
            "latents": "latents", "evaluation_reference": "evaluation_reference", "distilled": "lora_k1", "feedback_lora": "lora_feedback",
        },
        outputs={"unet": "one_step_unet", **{kind: f"{kind}_unet" for kind in ("report", "metrics", "grid", "samples")}},
    )  # fmt: skip
