"""The main job, wired from the other pipelines."""

from typing import Any

from kedro.pipeline import Pipeline

from hypersd_pipeline.pipelines import data_prep, evaluation, tscd


def create_pipeline(**_: Any) -> Pipeline:
    """Data preparation, the four distillation stages, and evaluation of teacher and stages."""
    return data_prep.create_pipeline() + tscd.create_pipeline() + evaluation.create_pipeline()
