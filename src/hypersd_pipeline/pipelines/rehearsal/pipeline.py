"""Wiring of the rehearsal."""

from __future__ import annotations

from typing import Any

import pandas as pd
from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes.rehearsal.report import rehearse, require_passed
from hypersd_pipeline.recipes.rehearsal.world import Environment, RehearsalConfig
from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig, StageConfig


def rehearse_node(
    rehearsal: RehearsalConfig,
    teacher: TeacherConfig,
    data: DataConfig,
    evaluation: EvaluationConfig,
    tscd_k8: StageConfig,
    tscd_k4: StageConfig,
    tscd_k2: StageConfig,
    tscd_k1: StageConfig,
    feedback: FeedbackConfig,
    dmd: OneStepConfig,
    one_step_unet: OneStepConfig,
) -> tuple[pd.DataFrame, str]:
    """See `recipes.rehearsal.report.rehearse`."""
    stages: dict[str, StageConfig] = {
        "tscd_k8": tscd_k8, "tscd_k4": tscd_k4, "tscd_k2": tscd_k2, "tscd_k1": tscd_k1, "feedback": feedback, "dmd": dmd,
        "one_step_unet": one_step_unet,
    }  # fmt: skip
    return rehearse(rehearsal, Environment(teacher, data, evaluation, stages))


def create_pipeline(**_: Any) -> Pipeline:
    """All sections of an environment -> ``rehearsal_table``, ``rehearsal_report``. The last node fails where a part failed."""
    stages = ("tscd_k8", "tscd_k4", "tscd_k2", "tscd_k1", "feedback", "dmd", "one_step_unet")
    sections = {name: f"params:{name}" for name in ("rehearsal", "teacher", "data", "evaluation")}
    inputs = {**sections, **{stage: f"params:{stage}.stage" for stage in stages}}
    return Pipeline(
        [
            Node(rehearse_node, inputs, ["rehearsal_table", "rehearsal_report"], name="rehearse"),
            Node(require_passed, "rehearsal_table", None, name="require_passed"),
        ]
    )
