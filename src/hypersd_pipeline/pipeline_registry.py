"""Registered pipelines: one per folder of ``pipelines/``. ``kedro run`` alone runs ``full_distill``."""

import warnings

from kedro.framework.project import find_pipelines
from kedro.pipeline import Pipeline


def register_pipelines() -> dict[str, Pipeline]:
    """Name to pipeline. Kedro imports only the folders that the command asks for."""
    with warnings.catch_warnings():
        # A pipeline with one stage names its handles as the namespaced stages do (teacher.metric_stream), to share their catalog entries.
        warnings.filterwarnings("ignore", message="One or more dataset names contain '.'")
        pipelines = find_pipelines(raise_errors=True)
    if "full_distill" in pipelines:
        pipelines["__default__"] = pipelines["full_distill"]
    return pipelines
