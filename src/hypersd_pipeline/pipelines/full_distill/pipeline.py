"""The main job, wired from the other pipelines."""

from typing import Any

from kedro.pipeline import Pipeline

from hypersd_pipeline.pipelines import data_prep, dmd, evaluation, feedback, one_step_unet, tscd


def create_pipeline(**_: Any) -> Pipeline:
    """Data preparation, four stages of TSCD, feedback, the one-step stages, and the evaluation of the teacher and of each stage."""
    return sum((part.create_pipeline() for part in (data_prep, tscd, feedback, dmd, one_step_unet, evaluation)), Pipeline([]))
