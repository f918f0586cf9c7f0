"""Grids and boundaries, against diffusers and against tables written by hand."""

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler

from hypersd_pipeline.diffusion.grids import boundaries, check_grid, segment_start, solver_grid, tcd_timesteps, trailing_timesteps
from hypersd_pipeline.errors import UserError

# segment start: the grid points (N = 40) whose student starts there
POINTS_OF = {
    8: {
        0: [24, 49, 74, 99, 124],
        124: [149, 174, 199, 224, 249],
        249: [274, 299, 324, 349, 374],
        374: [399, 424, 449, 474, 499],
        499: [524, 549, 574, 599, 624],
        624: [649, 674, 699, 724, 749],
        749: [774, 799, 824, 849, 874],
        874: [899, 924, 949, 974, 999],
    },
    4: {
        0: [24, 49, 74, 99, 124, 149, 174, 199, 224, 249],
        249: [274, 299, 324, 349, 374, 399, 424, 449, 474, 499],
        499: [524, 549, 574, 599, 624, 649, 674, 699, 724, 749],
        749: [774, 799, 824, 849, 874, 899, 924, 949, 974, 999],
    },
    2: {
        0: [24, 49, 74, 99, 124, 149, 174, 199, 224, 249, 274, 299, 324, 349, 374, 399, 424, 449, 474, 499],
        499: [524, 549, 574, 599, 624, 649, 674, 699, 724, 749, 774, 799, 824, 849, 874, 899, 924, 949, 974, 999],
    },
    1: {0: list(range(24, 1000, 25))},
}


@pytest.mark.parametrize("segments", [8, 4, 2, 1])
def test_every_grid_point_has_its_segment_start(segments):
    grid, bounds = solver_grid(40), boundaries(segments)
    check_grid(grid, bounds)
    starts = segment_start(grid[1:], bounds)
    expected = {t: start for start, points in POINTS_OF[segments].items() for t in points}
    assert dict(zip(grid[1:].tolist(), starts.tolist(), strict=True)) == expected
    assert bounds.tolist() == [*POINTS_OF[segments], 999]
    previous = grid[:-1]
    assert (starts <= previous).all()  # the range of t_end is never empty
    first = [points[0] for points in POINTS_OF[segments].values()]
    assert grid[1:][starts == previous].tolist() == first  # empty but for t_b itself at the first point after each boundary, only there


@pytest.mark.parametrize("segments", [8, 4, 2, 1])
def test_the_boundaries_are_the_students_sampling_grid(segments):
    assert boundaries(segments)[1:].flip(0).tolist() == trailing_timesteps(segments).tolist()


def test_solver_grid_of_40():
    grid = solver_grid(40)
    assert grid.dtype == torch.int64 and grid.tolist() == [0, *range(24, 1000, 25)] and len(grid) == 41


def test_a_grid_of_50_is_refused_where_it_misses_boundaries():
    with pytest.raises(
        UserError, match=r"solver_points: a grid of 50 .*\[124, 249, 374, 624, 749, 874\] of segments: 8; use solver_points: 40"
    ):
        check_grid(solver_grid(50), boundaries(8))
    with pytest.raises(UserError, match=r"\[249, 749\] of segments: 4"):
        check_grid(solver_grid(50), boundaries(4))
    check_grid(solver_grid(50), boundaries(2))
    check_grid(solver_grid(50), boundaries(1))


@pytest.mark.parametrize("points", [0, -40, 30, 1000, 2000])
def test_points_that_make_no_grid_are_refused(points):
    with pytest.raises(UserError, match=f"solver_points: {points} "):
        solver_grid(points)


@pytest.mark.parametrize("segments", [0, 3, 1000])
def test_segments_that_make_no_boundaries_are_refused(segments):
    with pytest.raises(UserError, match=f"segments: {segments} "):
        boundaries(segments)


@pytest.mark.parametrize("steps", range(1, 51))
def test_trailing_is_diffusers_trailing(steps):
    reference = DDIMScheduler(num_train_timesteps=1000, timestep_spacing="trailing")
    reference.set_timesteps(steps)
    assert trailing_timesteps(steps).tolist() == reference.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 16, 50])
def test_tcd_is_diffusers_tcd(steps):
    reference = TCDScheduler(num_train_timesteps=1000)
    reference.set_timesteps(steps)
    grid = tcd_timesteps(steps)
    assert grid.dtype == torch.int64 and grid.tolist() == reference.timesteps.tolist()


def test_tcd_of_four_is_not_trailing():
    assert tcd_timesteps(4).tolist() == [999, 759, 499, 259]
    assert trailing_timesteps(4).tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("steps", [0, 51])
def test_tcd_has_fifty_points(steps):
    with pytest.raises(UserError, match=f"steps: {steps} is not between 1 and the 50 points"):
        tcd_timesteps(steps)
