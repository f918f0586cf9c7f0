"""Wiring of feedback learning."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.pipelines.feedback.nodes import measure_tradeoff, merge_feedback, train_feedback

SOURCE = "lora_k1"
"""The distilled LoRA that feedback is trained on top of."""


def create_pipeline(**_: Any) -> Pipeline:
    """``lora_k1``, rewards and segmentation model -> ``lora_feedback``, its merges, the trade-off."""
    shared = {name: name for name in ("manifest", "latents", "lora")}
    parameters = {"data": "params:data", "teacher": "params:teacher", "evaluation": "params:evaluation", "stage": "params:stage"}
    train = Node(
        train_feedback,
        {**shared, **parameters, "checkpoints": "checkpoints", "metric_stream": "metric_stream"},
        ["feedback_lora", "report"],
        name="train",
    )
    merge = Node(merge_feedback, {"lora": "lora", "feedback_lora": "feedback_lora", "stage": "params:stage"}, "merged", name="merge")
    measure = Node(
        measure_tradeoff,
        {**shared, **parameters, "reference": "evaluation_reference", "feedback_lora": "feedback_lora"},
        ["tradeoff", "metrics", "plot", "grid"],
        name="measure",
    )
    return Pipeline(
        [train, merge, measure],
        namespace="feedback",
        parameters={"params:data", "params:teacher", "params:evaluation"},
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
