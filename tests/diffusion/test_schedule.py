"""The schedule and the DDIM step, against diffusers' scheduler."""

import pytest
import torch
from diffusers import DDIMScheduler

from hypersd_pipeline.diffusion.schedule import Schedule, add_noise, ddim, to_x0_eps
from hypersd_pipeline.errors import UserError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
KINDS = ("epsilon", "v_prediction", "sample")


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule.from_config(SD)


def scheduler(steps: int, prediction_type: str) -> DDIMScheduler:
    config = {"prediction_type": prediction_type, "clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    result = DDIMScheduler(**SD, **config)
    result.set_timesteps(steps)
    return result


def at(t: int, batch: int = 2) -> torch.Tensor:
    return torch.full((batch,), t)


@pytest.mark.parametrize("config", [SD, {**SD, "beta_schedule": "linear"}, {"trained_betas": torch.linspace(0.001, 0.02, 1000).tolist()}])
def test_alphas_are_the_schedulers(config):
    ours = Schedule.from_config(config)
    assert ours.alphas.dtype == ours.sigmas.dtype == torch.float64 and ours.num_train_timesteps == 1000
    torch.testing.assert_close((ours.alphas**2).float(), DDIMScheduler(**config).alphas_cumprod, rtol=1e-4, atol=1e-7)  # theirs is float32


def test_the_known_ends_of_stable_diffusion(schedule):
    squared = schedule.alphas**2
    assert squared[0].item() == pytest.approx(0.99915, abs=1e-9) and squared[-1].item() == pytest.approx(0.0047, abs=5e-5)
    ratio = schedule.sigmas / schedule.alphas
    assert [round(ratio[t].item(), 1) for t in (999, 800, 399)] == [14.6, 5.1, 1.2]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"), ({"rescale_betas_zero_snr": True}, "zero-terminal-SNR")],
)
def test_other_schedules_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Schedule.from_config({**SD, **change})


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_is_diffusers_ddim(schedule, steps, kind):
    reference = scheduler(steps, kind)
    generator = torch.Generator().manual_seed(steps)
    timesteps = reference.timesteps.tolist()
    for t, s in zip(timesteps, [*timesteps[1:], 0], strict=True):
        x, output = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
        step = reference.step(output, t, x, eta=0.0)
        x0, eps = to_x0_eps(output, x, at(t), schedule, kind)
        torch.testing.assert_close(x0, step.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ddim(x0, eps, at(s), schedule), step.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_invert_the_definitions(schedule, kind):
    x0, z = torch.randn(5, 4, 3, 3, dtype=torch.float64), torch.randn(5, 4, 3, 3, dtype=torch.float64)
    t = torch.tensor([0, 1, 124, 500, 999])
    alpha, sigma = schedule.at(t, x0)
    x_t = add_noise(x0, z, t, schedule)
    torch.testing.assert_close(x_t, alpha * x0 + sigma * z)
    output = {"epsilon": z, "v_prediction": alpha * z - sigma * x0, "sample": x0}[kind]
    got_x0, got_eps = to_x0_eps(output, x_t, t, schedule, kind)
    torch.testing.assert_close(got_x0, x0)
    torch.testing.assert_close(got_eps, z)
    torch.testing.assert_close(ddim(got_x0, got_eps, t, schedule), x_t)  # with s = t the solver is the identity


def test_add_noise_is_the_schedulers(schedule):
    x0, z, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    torch.testing.assert_close(add_noise(x0, z, t, schedule), scheduler(4, "epsilon").add_noise(x0, z, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_converted_in_float32(schedule, half):
    output, x = torch.randn(2, 4, 8, 8).to(half), torch.randn(2, 4, 8, 8).to(half)
    x0, eps = to_x0_eps(output, x, at(999), schedule, "epsilon")
    assert x0.dtype == eps.dtype == torch.float32
    exact = (x.double() - schedule.sigmas[999] * output.double()) / schedule.alphas[999]
    torch.testing.assert_close(x0.double(), exact, rtol=1e-6, atol=1e-6)
    assert add_noise(output, x, at(500), schedule).dtype == half


def test_the_solver_keeps_gradients(schedule):
    output = torch.randn(2, 4, 2, 2, requires_grad=True)
    x0, eps = to_x0_eps(output, torch.randn(2, 4, 2, 2), at(500), schedule, "epsilon")
    ddim(x0, eps, at(400), schedule).sum().backward()
    alpha, sigma = schedule.alphas, schedule.sigmas
    slope = sigma[400] - alpha[400] * sigma[500] / alpha[500]
    torch.testing.assert_close(output.grad, torch.full_like(output, slope.item()))


@pytest.mark.parametrize(
    "t", [torch.tensor([1.0, 2.0]), torch.tensor([1]), torch.tensor([[1], [2]]), torch.tensor([1, 2], dtype=torch.int32)]
)
def test_timesteps_of_the_wrong_kind_are_refused(schedule, t):
    with pytest.raises(ValueError, match="int64"):
        add_noise(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2), t, schedule)


def test_an_unknown_prediction_type_is_refused(schedule):
    with pytest.raises(ValueError, match="flow"):
        to_x0_eps(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), at(5, 1), schedule, "flow")  # type: ignore[arg-type]
