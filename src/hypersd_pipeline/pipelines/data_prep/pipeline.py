"""Wiring of data preparation."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Pipeline

from hypersd_pipeline.pipelines.nodes import data_nodes


def create_pipeline(**kwargs: Any) -> Pipeline:
    """``params:data``, ``params:teacher`` -> ``dataset``, ``manifest``, ``rejected_rows``, ``latents``."""
    return Pipeline(data_nodes())
