"""Continuous-time consistency distillation (sCM, arXiv 2410.11081) from a discrete, variance-preserving teacher.

TrigFlow writes ``x = cos a x0 + sin a z`` (section 3.1). With unit noise a variance-preserving process is the same: ``a`` is
`Process.angle`, and the data's deviation that TrigFlow divides by is 1. A network is seen as TrigFlow's ``F``, the velocity ``dx / da``.
The consistency function is ``f = cos a x - sin a F`` (eq. 5), which is the clean sample that the network sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser

STEADY = 0.1
"""The constant ``c`` of the tangent normalisation (algorithm 1)."""

Derivative = Callable[..., Any]
"""``(function, point, direction) -> (value, derivative along the direction)``, as ``torch.func.jvp``."""


@torch.no_grad()
def teacher_velocity(teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """``dx / da`` of the teacher's probability-flow ODE (with its guidance, where it has one), float64 ``[b, c, h, w]``."""
    x0, eps = teacher.predict(x_t, t, cond)
    return teacher.process.velocity(x0, eps, teacher.process.angle(t, x_t))


@torch.no_grad()
def velocity_along(
    student: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning, velocity: Tensor, derivative: Derivative = torch.func.jvp
) -> tuple[Tensor, Tensor]:
    """``F`` of the student at ``(x_t, t)``, and ``dF / da`` along the teacher's ODE. Both float64 ``[b, c, h, w]``.

    Between two timesteps the network is told the fraction: its embedding of the timestep is a function of real numbers.

    Args:
        t: int64 ``[b]``. velocity: see `teacher_velocity`.
    """
    process = student.process
    here, pace = process.angle(t, x_t), process.pace(t, x_t)

    def seen(x: Tensor, angle: Tensor) -> Tensor:
        told = t + ((angle - here) * pace).flatten()
        x0, eps = process.converted(student.network(x, told.to(x.dtype), cond), x, angle.cos(), angle.sin())
        return process.velocity(x0, eps, angle)

    return derivative(seen, (x_t, here), (velocity.to(x_t.dtype), torch.ones_like(here)))  # type: ignore[no-any-return]


@torch.no_grad()
def velocity_between(
    student: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning, velocity: Tensor, span: int = 1
) -> tuple[Tensor, Tensor]:
    """`velocity_along` by the difference between timesteps ``span`` above and below, which are whole numbers as in the teacher's training.

    Beyond the schedule's ends the difference is one-sided.
    """
    process = student.process
    here = process.angle(t, x_t)

    def seen(s: Tensor) -> tuple[Tensor, Tensor]:
        angle = process.angle(s, x_t)
        x0, eps = student.predict((x_t + (angle - here) * velocity).to(x_t.dtype), s, cond)
        return process.velocity(x0, eps, angle), angle

    (above, late), (below, early) = seen((t + span).clamp(max=process.last_timestep)), seen((t - span).clamp(min=0))
    return seen(t)[0], (above - below) / (late - early)


def tangent(F: Tensor, dF: Tensor, x_t: Tensor, velocity: Tensor, angle: Tensor, warm: float | Tensor = 1.0) -> Tensor:
    """``g = -cos^2 a (F - dx/da) - r cos a sin a (x + dF/da)`` of algorithm 1. With ``r = 1`` it is ``cos a df/da`` (eq. 6).

    Args:
        F, dF: see `velocity_along`. velocity: of the teacher. angle: ``[b, 1, 1, 1]``.
        warm: ``r``, from 0 to 1 over the first updates: at 0 the student learns the teacher's velocity.
    """
    return -(angle.cos() ** 2) * (F - velocity) - warm * angle.cos() * angle.sin() * (x_t + dF)


def normalised(g: Tensor, steady: float = STEADY) -> Tensor:
    """``g / (|g| + c)``, the norm of each sample (section 4.2, "tangent normalization")."""
    return g / (g.flatten(1).norm(dim=1).view(-1, *[1] * (g.ndim - 1)) + steady)


def clean_target(F: Tensor, g: Tensor, x_t: Tensor, angle: Tensor) -> Tensor:
    """The clean sample of the velocity ``F + g``, which algorithm 1 regresses on: ``cos a x - sin a (F + g)``."""
    return angle.cos() * x_t - angle.sin() * (F + g)


def velocity_error(clean: Tensor, target: Tensor, angle: Tensor) -> Tensor:
    """``|F - F' |^2 / D`` of algorithm 1 for two clean samples at the same ``(x, a)``, the mean over the batch.

    Its gradient at ``F`` is ``-2 g / D`` where the target is `clean_target` of that ``F``. The weight that sCM learns for each time is left
    out: it makes the losses of all times equal, and those of normalised tangents are nearly so.
    """
    return ((clean.double() - target.double()) / angle.sin()).square().mean().float()
