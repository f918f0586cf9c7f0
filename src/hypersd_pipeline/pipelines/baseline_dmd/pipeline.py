"""Wiring of the baseline; its settings are in ``conf/base/parameters_baselines.yml``."""

from typing import Any

from kedro.pipeline import Pipeline

from hypersd_pipeline.pipelines import evaluation
from hypersd_pipeline.pipelines.dmd.pipeline import unified_pipeline


def create_pipeline(**_: Any) -> Pipeline:
    """Train and evaluate."""
    return evaluation.create_pipeline().only_nodes("prepare_reference") + unified_pipeline("baseline_dmd", "dmd", from_stages=False)
