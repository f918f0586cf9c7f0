"""Wiring of the baseline; its settings are in ``conf/base/parameters_baselines.yml``."""

from typing import Any

from kedro.pipeline import Pipeline

from hypersd_pipeline.pipelines.tscd.pipeline import chain


def create_pipeline(**_: Any) -> Pipeline:
    """Train and evaluate."""
    return chain({"baseline_pcm": "pcm"})
