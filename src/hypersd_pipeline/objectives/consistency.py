"""Trajectory-segmented consistency distillation (Hyper-SD section 3.1, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.diffusion.grids import segment_start
from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.draws import rand, randint, randn


@dataclass(frozen=True)
class Timesteps:
    """The four times of each sample, int64 ``[b]``, ``t_b <= t_end <= t_prev < t_n``, all on the solver grid.

    Attributes:
        t_n: where the student stands. t_prev: ``t_{n-1}``, one solver step below. t_b: start of the student's segment.
        t_end: where both are compared.
    """

    t_n: Tensor
    t_prev: Tensor
    t_b: Tensor
    t_end: Tensor


def sample_timesteps(
    batch: int,
    grid: Tensor,
    bounds: Tensor,
    generator: torch.Generator,
    *,
    starts: Literal["grid", "segment_ends"] = "grid",
    ends: Literal["uniform", "segment_start"] = "uniform",
) -> Timesteps:
    """Draw ``t_n`` uniform over the grid and ``t_end`` uniform over the grid points in ``[t_b, t_{n-1}]``, both ends included.

    ``t_b`` is ``max{b_j < t_n}``. Equation 11 read literally gives ``t_b > t_{n-1}`` at the first point after each boundary.

    Args:
        grid: int64 ``[N + 1]`` rising, from the clean end (`solver_grid`). bounds: int64 ``[k + 1]`` (`boundaries`), all on the grid.
        starts: ``segment_ends`` draws ``t_n`` among the boundaries only. ends: ``segment_start`` makes ``t_end = t_b``.
    """
    if starts == "segment_ends":
        n = torch.searchsorted(grid, bounds)[randint(1, len(bounds), (batch,), generator)]
    else:
        n = randint(1, len(grid), (batch,), generator)
    t_b = segment_start(grid[n], bounds)
    if ends == "segment_start":
        return Timesteps(t_n=grid[n], t_prev=grid[n - 1], t_b=t_b, t_end=t_b)
    low = torch.searchsorted(grid, t_b)
    choices = n - low  # grid indices low .. n - 1
    end = low + (rand((batch,), generator, torch.float64) * choices).long().clamp(max=choices - 1)
    return Timesteps(t_n=grid[n], t_prev=grid[n - 1], t_b=t_b, t_end=grid[end])


def offset_noise(shape: tuple[int, ...], strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise plus ``strength * randn(b, c, 1, 1)``, the paper's "noise perturbation". float32 ``shape = (b, c, h, w)``."""
    noise = randn(shape, generator)
    return noise + strength * randn((*shape[:2], 1, 1), generator)


def noisy_input(x0: Tensor, z: Tensor, t_n: Tensor, process: Process, *, pure_noise: bool = True) -> Tensor:
    """``x_tn = alpha x0 + sigma z``. With ``pure_noise`` just ``z`` at the last training timestep.

    ``abar_999`` is 0.0047, so that ``alpha x0 + sigma z`` would leak the image there, while sampling starts from pure noise
    (SDXL-Lightning, eq. 24).
    """
    last = (pure_noise & (t_n == process.last_timestep)).view(-1, 1, 1, 1)
    return torch.where(last, z, process.add_noise(x0, z, t_n))


@torch.no_grad()
def solver_step(teacher: Denoiser, x_tn: Tensor, times: Timesteps, cond: Conditioning) -> Tensor:
    """``xhat``: one DDIM step of the teacher (with its guidance, where it has one) from ``t_n`` to ``t_{n-1}``."""
    return teacher.jump(x_tn, times.t_n, times.t_prev, cond)


@torch.no_grad()
def solver_target(teacher: Denoiser, xhat: Tensor, times: Timesteps, cond: Conditioning, *, grid: Tensor, steps: int) -> Tensor:
    """The teacher's own way on from ``xhat``, one DDIM step of the grid after another, until each sample is at its ``t_end``.

    Args:
        steps: that the longest way has (`longest_way`).
    """
    x, t = xhat, times.t_prev
    for _ in range(steps):
        moving = t > times.t_end
        lower = torch.where(moving, grid[(torch.searchsorted(grid, t) - 1).clamp(min=0)], t)
        x = torch.where(moving.view(-1, 1, 1, 1), teacher.jump(x, t, lower, cond), x)
        t = lower
    return x


def longest_way(times: Timesteps, grid: Tensor) -> int:
    """Grid steps from ``t_prev`` to ``t_end``, of the sample that has the most. Asked of times on the CPU, where they are drawn."""
    return int((torch.searchsorted(grid, times.t_prev) - torch.searchsorted(grid, times.t_end)).max())


@torch.no_grad()
def consistency_target(ema: Denoiser, xhat: Tensor, times: Timesteps, cond: Conditioning) -> Tensor:
    """``Psi(ema(xhat, t_{n-1}), t_end)``. ``xhat`` itself where ``t_{n-1} = t_b``.

    The segment is the student's, from ``t_n``: at ``t_{n-1} = t_b`` the network would otherwise be asked from the segment below.
    """
    arrived = (times.t_prev == times.t_b).view(-1, 1, 1, 1)
    return torch.where(arrived, xhat, ema.jump(xhat, times.t_prev, times.t_end, cond))


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, both at ``t_end`` (CTM would map both to the clean end first: not the same)."""
    return (prediction.float() - target.float()).square().mean()


def huber(prediction: Tensor, target: Tensor, c: float = 0.001) -> Tensor:
    """The mean of ``sqrt(d^2 + c^2) - c`` over all elements (LCM's pseudo-Huber distance, arXiv 2310.04378)."""
    return ((prediction.float() - target.float()).square() + c**2).sqrt().mean() - c
