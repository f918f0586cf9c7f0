"""The process and its DDIM step, against diffusers' scheduler."""

import pytest
import torch
from diffusers import DDIMScheduler

from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.errors import UserError

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
KINDS = ("epsilon", "v_prediction", "sample")


@pytest.fixture(scope="module")
def process() -> Process:
    return Process.from_config(SD)


def scheduler(steps: int, prediction_type: str) -> DDIMScheduler:
    config = {"prediction_type": prediction_type, "clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"}
    result = DDIMScheduler(**SD, **config)
    result.set_timesteps(steps)
    return result


def at(t: int, batch: int = 2) -> torch.Tensor:
    return torch.full((batch,), t)


@pytest.mark.parametrize("config", [SD, {**SD, "beta_schedule": "linear"}, {"trained_betas": torch.linspace(0.001, 0.02, 1000).tolist()}])
def test_alphas_are_the_schedulers(config):
    ours = Process.from_config(config)
    assert ours.alphas.dtype == ours.sigmas.dtype == torch.float64 and ours.num_train_timesteps == 1000
    torch.testing.assert_close((ours.alphas**2).float(), DDIMScheduler(**config).alphas_cumprod, rtol=1e-4, atol=1e-7)  # theirs is float32


def test_the_known_ends_of_stable_diffusion(process):
    squared = process.alphas**2
    assert squared[0].item() == pytest.approx(0.99915, abs=1e-9) and squared[-1].item() == pytest.approx(0.0047, abs=5e-5)
    ratio = process.sigmas / process.alphas
    assert [round(ratio[t].item(), 1) for t in (999, 800, 399)] == [14.6, 5.1, 1.2]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"), ({"rescale_betas_zero_snr": True}, "zero-terminal-SNR")],
)
def test_other_schedules_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        Process.from_config({**SD, **change})


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 25, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_is_diffusers_ddim(steps, kind):
    process, reference = Process.from_config(SD, kind), scheduler(steps, kind)
    generator = torch.Generator().manual_seed(steps)
    timesteps = reference.timesteps.tolist()
    for t, s in zip(timesteps, [*timesteps[1:], 0], strict=True):
        x, output = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
        step = reference.step(output, t, x, eta=0.0)
        x0, eps = process.to_x0_eps(output, x, at(t))
        torch.testing.assert_close(x0, step.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(process.ddim(x0, eps, at(s)), step.prev_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_invert_the_definitions(kind):
    process = Process.from_config(SD, kind)
    x0, z = torch.randn(5, 4, 3, 3, dtype=torch.float64), torch.randn(5, 4, 3, 3, dtype=torch.float64)
    t = torch.tensor([0, 1, 124, 500, 999])
    alpha, sigma = process.alpha_sigma(t, x0)
    x_t = process.add_noise(x0, z, t)
    torch.testing.assert_close(x_t, alpha * x0 + sigma * z)
    output = {"epsilon": z, "v_prediction": alpha * z - sigma * x0, "sample": x0}[kind]
    got_x0, got_eps = process.to_x0_eps(output, x_t, t)
    torch.testing.assert_close(got_x0, x0)
    torch.testing.assert_close(got_eps, z)
    torch.testing.assert_close(process.ddim(got_x0, got_eps, t), x_t)  # with s = t the solver is the identity


def test_add_noise_is_the_schedulers(process):
    x0, z, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    torch.testing.assert_close(process.add_noise(x0, z, t), scheduler(4, "epsilon").add_noise(x0, z, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_converted_in_float32(process, half):
    output, x = torch.randn(2, 4, 8, 8).to(half), torch.randn(2, 4, 8, 8).to(half)
    x0, eps = process.to_x0_eps(output, x, at(999))
    assert x0.dtype == eps.dtype == torch.float32
    exact = (x.double() - process.sigmas[999] * output.double()) / process.alphas[999]
    torch.testing.assert_close(x0.double(), exact, rtol=1e-6, atol=1e-6)
    assert process.add_noise(output, x, at(500)).dtype == half


def test_the_solver_keeps_gradients(process):
    output = torch.randn(2, 4, 2, 2, requires_grad=True)
    x0, eps = process.to_x0_eps(output, torch.randn(2, 4, 2, 2), at(500))
    process.ddim(x0, eps, at(400)).sum().backward()
    alpha, sigma = process.alphas, process.sigmas
    slope = sigma[400] - alpha[400] * sigma[500] / alpha[500]
    torch.testing.assert_close(output.grad, torch.full_like(output, slope.item()))


@pytest.mark.parametrize(
    "t", [torch.tensor([1.0, 2.0]), torch.tensor([1]), torch.tensor([[1], [2]]), torch.tensor([1, 2], dtype=torch.int32)]
)
def test_timesteps_of_the_wrong_kind_are_refused(process, t):
    with pytest.raises(ValueError, match="int64"):
        process.add_noise(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2), t)


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="flow"):
        Process.from_config(SD, "flow")  # type: ignore[arg-type]


def test_the_last_timestep_and_the_grids_follow_t(process):
    assert (process.num_train_timesteps, process.last_timestep) == (1000, 999)
    assert process.trailing_timesteps(4).tolist() == [999, 749, 499, 249] and process.boundaries(4).tolist() == [0, 249, 499, 749, 999]
    short = Process.from_config({**SD, "num_train_timesteps": 100})
    assert short.last_timestep == 99 and short.solver_grid(4).tolist() == [0, 24, 49, 74, 99]
    assert short.boundaries(2).tolist() == [0, 49, 99] and short.trailing_timesteps(2).tolist() == [99, 49]


def test_renoising_is_the_identity_in_place_and_ends_at_the_level_of_t(process):
    x, z, t = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([24, 499])
    torch.testing.assert_close(process.renoise(x, t, t, z), x)
    # from the variance-preserving x_s = alpha_s x0 + sigma_s z' the noise of both together has the variance sigma_t^2
    generator, s, t = torch.Generator().manual_seed(0), at(249, 1), at(749, 1)
    x0 = torch.ones(1, 1, 300, 300)
    noise, more = (torch.randn(x0.shape, generator=generator) for _ in range(2))
    found = process.renoise(process.add_noise(x0, noise, s), s, t, more)
    assert found.mean().item() == pytest.approx(process.alphas[749].item(), abs=0.01)
    assert found.std().item() == pytest.approx(process.sigmas[749].item(), abs=0.01)
