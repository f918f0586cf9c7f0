"""The consistency distance: TSCD's (Hyper-SD algorithm 1) and, with other settings, that of the methods it is compared with."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hypersd_pipeline.config import Count, Guidance
from hypersd_pipeline.objectives import consistency
from hypersd_pipeline.training.terms.base import Context, Cost, Place, Scalars, TermConfig, View


class ConsistencyConfig(TermConfig):
    """How the student's point on the trajectory and its target come about. The defaults are TSCD's.

    Attributes:
        segments: k.
        solver_points: N, a grid that contains every segment boundary (40 does for 8, 4, 2 and 1).
        teacher: whose step drives the solver: the original model with guidance, or the previous stage's LoRA, where guidance is baked in.
        guidance: range of the teacher's guidance scale, drawn uniformly per sample.
        starts: the student stands anywhere on the grid, or at the segments' ends only (progressive distillation).
        ends: both sides are compared anywhere between, or at the segment's start only (PCM; with one segment LCM).
        target: the averaged student, the student itself (LCM), or the teacher's own further steps (progressive distillation).
        pure_noise: pure noise, not a noised image, at the last grid point.
        offset_noise: strength of the noise perturbation.
        distance: squared error, or LCM's pseudo-Huber distance.
        batch: samples of a pass. None for the stage's own number.
    """

    kind: Literal["consistency"] = "consistency"
    segments: Literal[8, 4, 2, 1]
    solver_points: int = Field(default=40, ge=1, lt=100_000)
    teacher: Literal["base", "previous_stage"] = "base"
    guidance: tuple[Guidance, Guidance]
    starts: Literal["grid", "segment_ends"] = "grid"
    ends: Literal["uniform", "segment_start"] = "uniform"
    target: Literal["ema", "student", "solver"] = "ema"
    pure_noise: bool = True
    offset_noise: float = Field(default=0.05, ge=0, le=10)
    distance: Literal["mse", "huber"] = "mse"
    batch: Count | None = None

    place: ClassVar[Place] = "trajectory"

    @model_validator(mode="after")
    def _scales(self) -> ConsistencyConfig:
        check_scales(self.guidance)
        return self

    def build(self, context: Context) -> Consistency:
        """See `TermConfig`."""
        return Consistency(self.distance)

    def forwards(self, cost: Cost) -> float:
        """Solver 2 (one batched call with both halves of the guidance) or 1 (``previous_stage``), target 1, and the student.

        Progressive distillation's target is the teacher's further steps, until the batch's last sample has arrived.
        """
        solver = 2.0 if self.teacher == "base" else 1.0
        target = solver * (self.solver_points / self.segments - 1) if self.target == "solver" else 1.0
        return (solver + target + cost.student) * (self.batch or cost.batch) / cost.batch


class Consistency:
    """The distance between the student's jump and its target, both at ``t_end``."""

    def __init__(self, distance: Literal["mse", "huber"]) -> None:
        self.distance = consistency.mse if distance == "mse" else consistency.huber

    def __call__(self, view: View, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """See `Term`."""
        assert view.prediction.target is not None
        distance = self.distance(view.sample, view.prediction.target)
        return distance, {"distance": distance.detach()}


def check_scales(guidance: tuple[float, float]) -> None:
    """Raises ValueError unless ``guidance`` is a rising pair of scales from 1 on."""
    if not 1 <= guidance[0] <= guidance[1]:
        raise ValueError(f"guidance must be a rising pair of scales from 1 on, not {list(guidance)}")
