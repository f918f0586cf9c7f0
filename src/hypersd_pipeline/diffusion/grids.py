"""Timestep grids: the solver's, the segments' boundaries, and the few-step sampler's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hypersd_pipeline.errors import UserError


def solver_grid(points: int, num_train_timesteps: int = 1000) -> Tensor:
    """``t_n = n T / N - 1`` for ``n = 1 .. N``, preceded by the clean end ``t_0 = 0``: int64 ``[N + 1]``, rising.

    Raises:
        UserError: ``points`` does not divide ``T``, or leaves no room between the points.
    """
    if not 1 <= points < num_train_timesteps or num_train_timesteps % points:  # with points == T, t_1 would be t_0 again
        raise UserError(
            f"solver_points: {points} is no proper divisor of the {num_train_timesteps} training timesteps; "
            f"use {_nearest_grid(points, num_train_timesteps)}."
        )
    skip = num_train_timesteps // points
    return torch.tensor([0, *range(skip - 1, num_train_timesteps, skip)])


def _nearest_grid(points: int, num_train_timesteps: int) -> int:
    """The number of points nearest to the asked one that divides the timesteps and has the boundaries of as many segments as can be."""
    divisors = [n for n in range(1, num_train_timesteps) if num_train_timesteps % n == 0]
    most = next(k for k in (8, 4, 2, 1) if any(n % k == 0 for n in divisors))
    return min((n for n in divisors if n % most == 0), key=lambda n: abs(n - points))


def boundaries(segments: int, num_train_timesteps: int = 1000) -> Tensor:
    """Segment boundaries ``b_0 = 0``, ``b_j = j T / k - 1`` for ``j = 1 .. k``: int64 ``[k + 1]``, rising.

    Raises:
        UserError: ``segments`` does not divide ``T``.
    """
    if not 1 <= segments < num_train_timesteps or num_train_timesteps % segments:
        dividing = [str(k) for k in (8, 4, 2, 1) if num_train_timesteps % k == 0 and k < num_train_timesteps]
        raise UserError(f"segments: {segments} does not divide the {num_train_timesteps} training timesteps; use {' or '.join(dividing)}.")
    return torch.tensor([0, *(j * num_train_timesteps // segments - 1 for j in range(1, segments + 1))])


def check_grid(grid: Tensor, bounds: Tensor) -> None:
    """Refuse a solver grid that misses a segment boundary.

    Raises:
        UserError: names the missing boundary and a grid that has all of them.
    """
    missing = sorted(set(bounds.tolist()) - set(grid.tolist()))
    if missing:
        raise UserError(
            f"solver_points: a grid of {len(grid) - 1} points has none at the segment boundaries {missing} of segments: {len(bounds) - 1}; "
            f"use solver_points: {_nearest_grid(len(grid) - 1, int(grid[-1]) + 1)}, which has them."
        )


def segment_start(t: Tensor, bounds: Tensor) -> Tensor:
    """``t_b = max{b_j < t}``: the lower end of the segment that a student at ``t >= 1`` belongs to. int64, the shape of ``t``."""
    return bounds[torch.searchsorted(bounds, t, right=False) - 1]


def trailing_timesteps(steps: int, num_train_timesteps: int = 1000) -> Tensor:
    """DDIM's "trailing" grid: int64 ``[steps]``, falling from ``T - 1``."""
    # numpy's arange as in diffusers: summing the float step rounds some halves the other way (48 steps: 936, not 937)
    return torch.from_numpy(np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / steps)).astype(np.int64) - 1)


TCD_POINTS = 50
"""Points of TCDScheduler's own grid, of which a sampler's steps are some."""


def tcd_timesteps(steps: int, num_train_timesteps: int = 1000, original_steps: int = TCD_POINTS) -> Tensor:
    """TCDScheduler's own grid (arXiv 2402.19159): ``steps`` of ``original_steps`` points ``n T / N - 1``, even by index. int64, falling.

    4 of 1000 are 999, 759, 499, 259, not trailing's 999, 749, 499, 249.

    Raises:
        UserError: more steps than points.
    """
    if not 1 <= steps <= original_steps:
        raise UserError(f"steps: {steps} is not between 1 and the {original_steps} points of TCDScheduler's grid; use fewer steps.")
    points = np.arange(original_steps, 0, -1) * (num_train_timesteps // original_steps) - 1
    return torch.from_numpy(points[np.floor(np.linspace(0, len(points), num=steps, endpoint=False)).astype(np.int64)])
