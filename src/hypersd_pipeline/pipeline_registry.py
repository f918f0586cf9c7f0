"""Registered pipelines: one per folder of ``pipelines/``; ``kedro run`` alone runs ``full_distill``."""

from kedro.framework.project import find_pipelines
from kedro.pipeline import Pipeline


def register_pipelines() -> dict[str, Pipeline]:
    """Name to pipeline. Kedro imports only the folders that the command asks for."""
    pipelines = find_pipelines(raise_errors=True)
    if "full_distill" in pipelines:
        pipelines["__default__"] = pipelines["full_distill"]
    return pipelines
