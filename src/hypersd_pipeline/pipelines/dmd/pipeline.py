"""Wiring of the unified LoRA's stage."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.pipelines.nodes import unified_pipeline
from hypersd_pipeline.recipes.one_step import choose_start


def create_pipeline(**_: Any) -> Pipeline:
    """``lora_k1`` and ``lora_feedback`` -> ``lora_unified`` and its metrics."""
    start = Node(choose_start, ["distilled", "feedback_lora", "params:stage"], "start", name="start")
    return unified_pipeline("dmd", "unified", [start], {"distilled": "lora_k1", "feedback_lora": "lora_feedback"})
