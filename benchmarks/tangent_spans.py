"""How sCM's tangent of the shipped teacher depends on the derivative: exact, and by differences over spans of timesteps.

    python benchmarks/tangent_spans.py

The teacher is its own student. Its 8-step samples (seed 0, guidance 3) are noised to single timesteps. The table has the mean cosine of
tangents before normalisation: of each span with the exact derivative, and of neighbouring spans with each other.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.objectives import continuous

SPANS = (1, 4, 10, 25)
TIMESTEPS = (100, 300, 500, 700, 900, 999)
PROMPTS = ["a red apple on a blue background", "a cat and a dog on a green background", "two stars", "a blue bus"] * 4


def main() -> None:
    """Print a markdown table."""
    model = load_teacher(TeacherConfig(), parts=("backbone", "text"))
    process, g = model.process, torch.Generator().manual_seed(0)
    student, cond = Denoiser(model.backbone, process), model.encode_prompts(PROMPTS)
    teacher = student.guided(model.unconditional(1), 3.0)
    x0, times = torch.randn(len(PROMPTS), *model.latent_shape, generator=g), [*process.trailing_timesteps(8).tolist(), 0]
    with torch.no_grad():
        for t, s in pairwise(times):
            x0 = teacher.jump(x0, *(torch.full((len(x0),), time) for time in (t, s)), cond)
    heads = [*(f"exact, {span}" for span in SPANS), *(f"{a}, {b}" for a, b in pairwise(SPANS))]
    print("|".join(["", "timestep", *heads, ""]), "|-" * (len(heads) + 1) + "|", sep="\n")
    for time in TIMESTEPS:
        t = torch.full((len(x0),), time)
        x_t = process.add_noise(x0, torch.randn(x0.shape, generator=g), t)
        velocity, angle = continuous.teacher_velocity(teacher, x_t, t, cond), process.angle(t, x_t)

        def tangent(found: tuple[Tensor, Tensor], x_t: Tensor = x_t, velocity: Tensor = velocity, angle: Tensor = angle) -> Tensor:
            return continuous.tangent(*found, x_t, velocity, angle).flatten(1)

        with sdpa_kernel(SDPBackend.MATH):
            exact = tangent(continuous.velocity_along(student, x_t, t, cond, velocity))
        spans = [tangent(continuous.velocity_between(student, x_t, t, cond, velocity, span)) for span in SPANS]
        pairs = [(exact, other) for other in spans] + list(pairwise(spans))
        print("|".join(["", str(time), *(f"{F.cosine_similarity(one, other).mean():.2f}" for one, other in pairs), ""]))


if __name__ == "__main__":
    main()
