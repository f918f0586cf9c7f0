"""Wiring of the rehearsal."""

from __future__ import annotations

from typing import Any

import pandas as pd
from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.nodes import stages_node
from hypersd_pipeline.recipes.rehearsal.report import rehearse, require_passed
from hypersd_pipeline.recipes.rehearsal.world import Environment, RehearsalConfig
from hypersd_pipeline.training.config import StageConfig


def rehearse_node(
    rehearsal: RehearsalConfig,
    teacher: TeacherConfig,
    data: DataConfig,
    evaluation: EvaluationConfig,
    stages: dict[str, StageConfig],
) -> tuple[pd.DataFrame, str]:
    """See `recipes.rehearsal.report.rehearse`."""
    return rehearse(rehearsal, Environment(teacher, data, evaluation, stages))


def create_pipeline(**_: Any) -> Pipeline:
    """All sections of an environment -> ``rehearsal_table``, ``rehearsal_report``. The last node fails where a part failed."""
    sections = {name: f"params:{name}" for name in ("rehearsal", "teacher", "data", "evaluation")}
    return Pipeline(
        [
            stages_node(),
            Node(rehearse_node, {**sections, "stages": "stages"}, ["rehearsal_table", "rehearsal_report"], name="rehearse"),
            Node(require_passed, "rehearsal_table", None, name="require_passed"),
        ]
    )
