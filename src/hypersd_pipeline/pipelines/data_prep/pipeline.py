"""Wiring of data preparation."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.recipes.prepare import cache_latents, generate_dataset, validate_rows


def create_pipeline(**kwargs: Any) -> Pipeline:
    """``params:data``, ``params:teacher`` -> ``dataset``, ``manifest``, ``rejected_rows``, ``latents``."""
    return Pipeline(
        [
            Node(generate_dataset, "params:data", "dataset", name="generate_dataset"),
            Node(validate_rows, ["dataset", "params:data"], ["manifest", "rejected_rows"], name="validate_rows"),
            Node(cache_latents, ["manifest", "params:data", "params:teacher"], "latents", name="cache_latents"),
        ]
    )
