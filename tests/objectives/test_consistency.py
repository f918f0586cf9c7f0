"""The consistency objective against its definition: the times, the solver step, the target, and who gets a gradient."""

import pytest
import torch

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.diffusion.grids import boundaries, check_grid, solver_grid
from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.objectives import consistency

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
PROCESS = Process.from_config(SD)
COND = Conditioning(torch.zeros(6, 2, 4))


def times(t_n, t_prev, t_b, t_end, n=6):
    return consistency.Timesteps(*(torch.full((n,), v) for v in (t_n, t_prev, t_b, t_end)))


def exact_eps(x_t, t, cond):
    """The noise prediction of a model that is the ODE's solution for data concentrated at 0.7."""
    alpha, sigma = PROCESS.alpha_sigma(t, x_t)
    return ((x_t - alpha * 0.7) / sigma).to(x_t.dtype)


@pytest.mark.parametrize("segments", [8, 4, 2, 1])
def test_every_triple_of_every_stage(segments):
    grid = [0, *range(24, 1000, 25)]
    bounds = [0, *(1000 * j // segments - 1 for j in range(1, segments + 1))]
    expected = set()
    for n in range(1, 41):
        t_b = max(b for b in bounds if b < grid[n])
        expected |= {(grid[n], grid[n - 1], t_b, e) for e in grid if t_b <= e <= grid[n - 1]}
    drawn = consistency.sample_timesteps(200_000, solver_grid(40), boundaries(segments), torch.Generator().manual_seed(0))
    found = set(zip(drawn.t_n.tolist(), drawn.t_prev.tolist(), drawn.t_b.tolist(), drawn.t_end.tolist(), strict=True))
    assert found == expected
    # the trap: at the first point after each boundary there is exactly one choice, the boundary itself
    for boundary in bounds[:-1]:
        first = min(t for t in grid if t > boundary)
        assert {(p, b, e) for t, p, b, e in found if t == first} == {(boundary, boundary, boundary)}


def test_t_n_and_t_end_are_uniform():
    drawn = consistency.sample_timesteps(200_000, solver_grid(40), boundaries(2), torch.Generator().manual_seed(1))
    counts = torch.bincount((drawn.t_n + 1) // 25, minlength=41)[1:]
    assert torch.all((counts / 5000 - 1).abs() < 0.08)
    ends = drawn.t_end[drawn.t_n == 499]  # 20 choices: 0, 24, ..., 474
    assert len(ends.unique()) == 20
    assert torch.all((torch.unique(ends, return_counts=True)[1] / (len(ends) / 20) - 1).abs() < 0.25)


@pytest.mark.parametrize(("points", "segments"), [(50, 8), (50, 4)])
def test_a_grid_that_misses_a_boundary_is_refused(points, segments):
    with pytest.raises(UserError, match=r"solver_points.*segment boundaries.*use solver_points: 40"):
        check_grid(solver_grid(points), boundaries(segments))


def test_pure_noise_at_the_last_point_only():
    x0, z = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    t = torch.tensor([999, 974])
    x = consistency.noisy_input(x0, z, t, PROCESS)
    assert torch.equal(x[0], z[0])
    assert torch.equal(x[1], PROCESS.add_noise(x0, z, t)[1])
    assert not torch.equal(PROCESS.add_noise(x0, z, t)[0], z[0])  # alpha_999 leaks the image


def test_offset_noise_moves_whole_channels():
    noise = consistency.offset_noise((400, 8, 8, 8), 0.5, torch.Generator().manual_seed(0))
    assert noise.mean(dim=(2, 3)).std().item() == pytest.approx((1 / 64 + 0.25) ** 0.5, rel=0.05)
    plain = consistency.offset_noise((4, 2, 8, 8), 0.0, torch.Generator().manual_seed(0))
    assert torch.equal(plain, torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_solver_step_by_hand_with_guidance():
    x, w = torch.full((1, 1, 1, 1), 0.3), 3.0
    uncond, cond = Conditioning(torch.zeros(1, 1, 1)), Conditioning(torch.ones(1, 1, 1))
    calls = []

    def teacher(x_t, t, c):
        calls.append(len(x_t))
        return 0.1 + 0.2 * c.prompt_embeds.view(-1, 1, 1, 1)

    step = consistency.Timesteps(*(torch.tensor([v]) for v in (499, 474, 0, 0)))
    guided = Denoiser(teacher, PROCESS).guided(uncond, torch.tensor([w]).view(-1, 1, 1, 1))
    got = consistency.solver_step(guided, x, step, cond)
    eps = 0.1 + w * 0.2  # uncond + w (cond - uncond)
    a, s = PROCESS.alphas, PROCESS.sigmas
    by_hand = a[474] * (0.3 - s[499] * eps) / a[499] + s[474] * eps
    assert got.item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert calls == [2]  # both halves in one call


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("t_n", "t_prev", "t_b", "t_end"), [(974, 949, 874, 899), (999, 974, 0, 0), (24, 0, 0, 0), (524, 499, 499, 499)])
def test_loss_is_zero_for_the_ode_solution(prediction_type, t_n, t_prev, t_b, t_end):
    def model(x_t, t, cond):
        eps = exact_eps(x_t, t, cond)
        if prediction_type == "epsilon":
            return eps
        alpha, sigma = PROCESS.alpha_sigma(t, x_t)
        return (alpha * eps - sigma * 0.7).to(x_t.dtype)

    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = times(t_n, t_prev, t_b, t_end)
    denoiser = Denoiser(model, Process.from_config(SD, prediction_type))
    xhat = consistency.solver_step(denoiser, x, step, COND)
    target = consistency.consistency_target(denoiser, xhat, step, COND)
    student = denoiser.jump(x, step.t_n, step.t_end, COND)
    assert consistency.mse(student, target).item() < 1e-12
    assert torch.allclose(target, PROCESS.ddim(torch.full_like(x, 0.7), exact_eps(x, step.t_n, COND), step.t_end), atol=1e-6)


def test_target_is_xhat_where_the_segment_ends():
    xhat = torch.randn(2, 1, 2, 2)
    step = consistency.Timesteps(torch.tensor([524, 549]), torch.tensor([499, 524]), torch.tensor([499, 499]), torch.tensor([499, 499]))
    target = consistency.consistency_target(Denoiser(lambda x, t, c: torch.full_like(x, 9.0), PROCESS), xhat, step, COND[:2])
    assert torch.equal(target[0], xhat[0])
    assert not torch.allclose(target[1], xhat[1])


def test_compared_at_t_end_not_at_the_clean_end():
    x = torch.randn(6, 1, 2, 2)
    step = times(999, 974, 874, 899)
    jumped = Denoiser(exact_eps, PROCESS).jump(x, step.t_n, step.t_end, COND)
    assert torch.allclose(jumped, PROCESS.ddim(torch.full_like(x, 0.7), exact_eps(x, step.t_n, COND), step.t_end), atol=1e-5)
    assert not torch.allclose(jumped, torch.full_like(x, 0.7), atol=1e-2)


def test_gradient_reaches_the_student_only():
    weights = {name: torch.tensor(0.5, requires_grad=True) for name in ("teacher", "ema", "student")}
    networks = {name: Denoiser(lambda x, t, c, w=w: w * x, PROCESS) for name, w in weights.items()}
    x, step = torch.randn(6, 1, 2, 2), times(999, 974, 0, 474)
    xhat = consistency.solver_step(networks["teacher"], x, step, COND)
    target = consistency.consistency_target(networks["ema"], xhat, step, COND)
    consistency.mse(networks["student"].jump(x, step.t_n, step.t_end, COND), target).backward()
    assert weights["teacher"].grad is None
    assert weights["ema"].grad is None
    assert weights["student"].grad.abs() > 0
