"""Wiring of the plan."""

from __future__ import annotations

from typing import Any

import pandas as pd
from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.nodes import stages_node
from hypersd_pipeline.recipes.plan.hardware import PlanConfig
from hypersd_pipeline.recipes.plan.report import make_plan, require_fit
from hypersd_pipeline.training.config import StageConfig


def plan_node(
    plan: PlanConfig,
    teacher: TeacherConfig,
    data: DataConfig,
    evaluation: EvaluationConfig,
    stages: dict[str, StageConfig],
) -> tuple[pd.DataFrame, str]:
    """See `recipes.plan.report.make_plan`."""
    return make_plan(plan, teacher, data, evaluation.batch_size, stages)


def create_pipeline(**_: Any) -> Pipeline:
    """All stages of an environment -> ``plan_table``, ``plan_report``. The last node fails where a stage does not fit."""
    sections = {name: f"params:{name}" for name in ("plan", "teacher", "data", "evaluation")}
    return Pipeline(
        [
            stages_node(),
            Node(plan_node, {**sections, "stages": "stages"}, ["plan_table", "plan_report"], name="plan"),
            Node(require_fit, ["params:plan", "plan_table"], None, name="require_fit"),
        ]
    )
