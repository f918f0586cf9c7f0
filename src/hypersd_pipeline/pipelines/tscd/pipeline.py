"""The four stages of TSCD, from many segments to one."""

from typing import Any

from kedro.pipeline import Pipeline

from hypersd_pipeline.pipelines.nodes import distil_pipeline, reference_node

CHAIN = (("k8", None), ("k4", "k8"), ("k2", "k4"), ("k1", "k2"))
"""Each stage, and the one that it starts from."""


def create_pipeline(**_: Any) -> Pipeline:
    """``latents`` -> ``lora_k8`` ... ``lora_k1`` and their metrics."""
    return sum((distil_pipeline(f"tscd_{name}", name, previous) for name, previous in CHAIN), Pipeline([reference_node()]))
