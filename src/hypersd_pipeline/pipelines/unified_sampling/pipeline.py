"""Wiring."""

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.evaluation.ways import measure_sampling


def create_pipeline(**_: Any) -> Pipeline:
    """``lora_unified`` -> ``sampling_metrics``, ``sampling_table``."""
    inputs = {
        "lora": "lora_unified",
        "teacher": "params:teacher",
        "reference": "evaluation_reference",
        "evaluation": "params:evaluation",
        "sampling": "params:unified_sampling",
    }
    return Pipeline([Node(measure_sampling, inputs, ["sampling_metrics", "sampling_table"], name="measure_sampling")])
