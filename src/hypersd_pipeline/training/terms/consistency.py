"""The consistency distance: TSCD's (Hyper-SD algorithm 1) and, with other settings, that of the methods it is compared with."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from hypersd_pipeline.config import Count, Guidance
from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.objectives import consistency, continuous
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
        target: the averaged student, the student itself (LCM), the teacher's own further steps (progressive distillation), or the student
            moved along its tangent (sCM, continuous time). The last one needs one segment that is compared at its start.
        pure_noise: pure noise, not a noised image, at the last grid point.
        offset_noise: strength of the noise perturbation.
        distance: squared error, or LCM's pseudo-Huber distance.
        batch: samples of a pass. None for the stage's own number.
        tangent_warmup: updates over which the tangent's second half grows from 0 to its full size.
        tangent_span: the derivative is the difference between so many timesteps above and below, where a teacher has learnt whole timesteps
            only. 0: the exact derivative.
    """

    kind: Literal["consistency"] = "consistency"
    segments: Literal[8, 4, 2, 1]
    solver_points: int = Field(default=40, ge=1, lt=100_000)
    teacher: Literal["base", "previous_stage"] = "base"
    guidance: tuple[Guidance, Guidance]
    starts: Literal["grid", "segment_ends"] = "grid"
    ends: Literal["uniform", "segment_start"] = "uniform"
    target: Literal["ema", "student", "solver", "tangent"] = "ema"
    pure_noise: bool = True
    offset_noise: float = Field(default=0.05, ge=0, le=10)
    distance: Literal["mse", "huber"] = "mse"
    batch: Count | None = None
    tangent_warmup: int = Field(default=0, ge=0, le=10**6)

    tangent_span: int = Field(default=0, ge=0, le=1000)

    later: ClassVar[frozenset[str]] = frozenset({"tangent_warmup", "tangent_span"})
    place: ClassVar[Place] = "trajectory"

    @model_validator(mode="after")
    def _scales(self) -> ConsistencyConfig:
        check_scales(self.guidance)
        if self.target == "tangent" and (self.segments, self.ends, self.distance) != (1, "segment_start", "mse"):
            raise ValueError("target: tangent needs segments: 1, ends: segment_start and distance: mse")
        return self

    def build(self, context: Context) -> Consistency | Tangent:
        """See `TermConfig`."""
        return Tangent(context.adapters.process) if self.target == "tangent" else Consistency(self.distance)

    def forwards(self, cost: Cost) -> float:
        """Solver 2 (one batched call with both halves of the guidance) or 1 (``previous_stage``), target 1, and the student.

        Progressive distillation's target is the teacher's further steps, until the batch's last sample has arrived. A tangent is a pass of
        values and one of derivatives, or three of values.
        """
        solver = 2.0 if self.teacher == "base" else 1.0
        target = {"solver": solver * (self.solver_points / self.segments - 1), "tangent": 3.0 if self.tangent_span else 2.0}.get(
            self.target, 1.0
        )
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


class Tangent:
    """sCM's distance between the student's velocity and that velocity moved along its tangent (see `objectives.continuous`)."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def __call__(self, view: View, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """See `Term`."""
        p = view.prediction
        assert p.target is not None
        distance = continuous.velocity_error(view.sample, p.target, self.process.angle(p.t, p.x_t))
        return distance, {"distance": distance.detach()}


def check_scales(guidance: tuple[float, float]) -> None:
    """Raises ValueError unless ``guidance`` is a rising pair of scales from 1 on."""
    if not 1 <= guidance[0] <= guidance[1]:
        raise ValueError(f"guidance must be a rising pair of scales from 1 on, not {list(guidance)}")
