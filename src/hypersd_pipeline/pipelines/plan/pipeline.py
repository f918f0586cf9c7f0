"""Wiring of the plan."""

from __future__ import annotations

from typing import Any

import pandas as pd
from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes.plan.hardware import PlanConfig
from hypersd_pipeline.recipes.plan.report import make_plan, require_fit
from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig, StageConfig


def plan_node(
    plan: PlanConfig,
    teacher: TeacherConfig,
    data: DataConfig,
    tscd_k8: StageConfig,
    tscd_k4: StageConfig,
    tscd_k2: StageConfig,
    tscd_k1: StageConfig,
    feedback: FeedbackConfig,
    dmd: OneStepConfig,
    one_step_unet: OneStepConfig,
) -> tuple[pd.DataFrame, str]:
    """See `recipes.plan.report.make_plan`."""
    stages: dict[str, StageConfig] = {
        "tscd_k8": tscd_k8, "tscd_k4": tscd_k4, "tscd_k2": tscd_k2, "tscd_k1": tscd_k1, "feedback": feedback, "dmd": dmd,
        "one_step_unet": one_step_unet,
    }  # fmt: skip
    return make_plan(plan, teacher, data, stages)


def create_pipeline(**_: Any) -> Pipeline:
    """All stages of an environment -> ``plan_table``, ``plan_report``. The last node fails where a stage does not fit."""
    stages = ("tscd_k8", "tscd_k4", "tscd_k2", "tscd_k1", "feedback", "dmd", "one_step_unet")
    sections = {name: f"params:{name}" for name in ("plan", "teacher", "data")}
    inputs = {**sections, **{stage: f"params:{stage}.stage" for stage in stages}}
    return Pipeline(
        [
            Node(plan_node, inputs, ["plan_table", "plan_report"], name="plan"),
            Node(require_fit, ["params:plan", "plan_table"], None, name="require_fit"),
        ]
    )
