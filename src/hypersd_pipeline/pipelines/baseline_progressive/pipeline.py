"""Wiring of the baseline; its settings are in ``conf/base/parameters_baselines.yml``."""

from typing import Any

from kedro.pipeline import Pipeline

from hypersd_pipeline.pipelines.tscd.pipeline import SEGMENTS, chain


def create_pipeline(**_: Any) -> Pipeline:
    """Train and evaluate."""
    return chain({f"baseline_progressive_k{k}": f"progressive_k{k}" for k in SEGMENTS})
