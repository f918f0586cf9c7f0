"""An objective of your own, trained for a few updates: one jump of the student has to end where two guided jumps of the teacher end.

`python examples/own_objective.py` takes about a minute on one core. It needs the package without its extras, and no data.
"""

from __future__ import annotations

import tempfile
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hypersd_pipeline.data.memory import MemoryRows
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import LoopConfig, make_accelerator, train
from hypersd_pipeline.training.rollouts import Trajectory
from hypersd_pipeline.training.stage import Stage
from hypersd_pipeline.training.terms import ConsistencyConfig, Context, Cost, Scalars, TermConfig, View
from hypersd_pipeline.training.terms.base import Place

PROMPTS = [f"a {thing} in the centre, {colour} background" for thing in ("turtle", "blossom") for colour in ("orange", "purple", "blue")]


class TwoJumpsConfig(TermConfig):
    """What the configuration says of the term. Attributes: ``guidance``: the scale of the teacher's jumps."""

    kind: Literal["two_jumps"] = "two_jumps"
    guidance: float = 3.0

    place: ClassVar[Place] = "trajectory"

    def build(self, context: Context) -> TwoJumps:
        """See `TermConfig`."""
        return TwoJumps(context.base, self.guidance)

    def forwards(self, cost: Cost) -> float:
        """Two jumps with both halves of the guidance. The student's own pass is counted by the consistency term."""
        return 4.0


class TwoJumps:
    """The squared distance between the student's jump from t to s and the teacher's, which stops halfway."""

    def __init__(self, teacher: Denoiser, guidance: float) -> None:
        self.teacher, self.guidance = teacher, guidance

    def __call__(self, view: View, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """See `Term`."""
        p = view.prediction
        assert p.uncond is not None
        teacher, halfway = self.teacher.guided(p.uncond, self.guidance), (p.t + p.s) // 2
        with torch.no_grad():
            target = teacher.jump(teacher.jump(p.x_t, p.t, halfway, p.cond), halfway, p.s, p.cond)
        distance = (view.sample - target).square().mean()
        return distance, {"two_jumps": distance.detach()}


def distance_of(stage: Stage, draws: int = 4) -> float:
    """The new term's mean distance over the same draws, whenever it is called."""
    generator = torch.Generator().manual_seed(1)
    return sum(float(stage(generator)[1]["two_jumps"]) for _ in range(draws)) / draws


def main() -> None:
    """Train a LoRA with the consistency distance and the new term. Print the new term's distance before and after."""
    teacher = load_teacher(TeacherConfig(), parts=("backbone", "text"), device="cpu")
    rows = MemoryRows.drawn_by(teacher, PROMPTS)
    adapters = AdaptedBackbone(teacher.backbone, teacher.process, rank=8, target_modules=("to_q", "to_k", "to_v", "to_out.0", "conv1"))
    student, base = adapters.denoiser("student"), adapters.denoiser(None)
    context = Context(adapters, student, base, rows, teacher.latent_shape, batch=8, device=teacher.device)
    consistency = ConsistencyConfig(segments=1, guidance=(2.5, 3.5))
    terms = [(term.weight, term.build(context)) for term in (consistency, TwoJumpsConfig(weight=0.5))]
    stage = Stage([(Trajectory(consistency, context), terms)], ready=lambda: adapters.use("student"))
    before = distance_of(stage)

    loop = LoopConfig(steps=20, batch_size=8, learning_rate=1e-3)
    trained, averaged = adapters.parameters("student"), adapters.parameters("ema")
    with tempfile.TemporaryDirectory() as folder:
        train(
            "own objective",
            parameters=trained,
            loss_fn=stage,
            config=loop,
            state={"adapters": adapters, **stage.state()},
            key="own objective",
            checkpoints=CheckpointStore(folder),
            metrics=lambda values, step: None,
            accelerator=make_accelerator(loop),
            after_update=lambda: ema_update(averaged, trained, 0.8),
        )
    print(f"distance to two jumps of the teacher: {before:.4f} before, {distance_of(stage):.4f} after {loop.steps} updates")


if __name__ == "__main__":
    main()
