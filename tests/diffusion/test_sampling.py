"""Sampling, against diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.diffusion.grids import trailing_timesteps
from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.diffusion.sampling import sample_ddim

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def toy(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """A nonlinear 'network' that sees the sample, the time and the prompt of each row."""
    return torch.tanh(x_t * 0.7 + t.view(-1, 1, 1, 1) / 1000 + cond.prompt_embeds.mean((1, 2)).view(-1, 1, 1, 1))


def conditioning(n: int, seed: int = 0) -> Conditioning:
    return Conditioning(torch.randn(n, 3, 4, generator=torch.Generator().manual_seed(seed)))


def denoiser(kind: str) -> Denoiser:
    return Denoiser(toy, Process.from_config(SD, kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (4, 1.0), (8, 3.0), (25, 3.0)])
def test_sampling_is_diffusers_loop(kind, steps, scale):
    scheduler = DDIMScheduler(
        **SD, prediction_type=kind, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    cond, uncond = conditioning(3), conditioning(1, seed=1)
    start = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x = start
    for t in scheduler.timesteps:
        at = t.expand(3)
        output = toy(x, at, uncond.expand(3)) * (1 - scale) + scale * toy(x, at, cond)
        x = scheduler.step(output, t, x, eta=0.0).prev_sample
    ours = denoiser(kind) if scale == 1 else denoiser(kind).guided(uncond, scale)
    got = sample_ddim(ours, start, cond, trailing_timesteps(steps))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)  # theirs is float32 throughout


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_stochastic_sampling_is_diffusers_tcd_loop(kind, eta):
    from diffusers import TCDScheduler

    scheduler = TCDScheduler(**SD, prediction_type=kind, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    grid = trailing_timesteps(4)
    scheduler.set_timesteps(timesteps=grid.tolist())
    cond, start = conditioning(3), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x, theirs, ours = start, torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        x = scheduler.step(toy(x, t.expand(3), cond), t, x, eta=eta, generator=theirs).prev_sample
    got = sample_ddim(denoiser(kind), start, cond, grid, eta=eta, noise=lambda step: torch.randn(start.shape, generator=ours))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs noise"):
        sample_ddim(denoiser(kind), start, cond, grid, eta=eta)


def test_to_clean_ends_at_what_the_last_call_sees():
    cond, start = conditioning(2), torch.randn(2, 4, 8, 8)
    ours = denoiser("epsilon")
    assert torch.equal(sample_ddim(ours, start, cond, torch.tensor([800]), to_clean=True), ours.clean(start, 800, cond))
    middle = ours.jump(start, torch.full((2,), 999), torch.full((2,), 499), cond)
    torch.testing.assert_close(sample_ddim(ours, start, cond, torch.tensor([999, 499]), to_clean=True), ours.clean(middle, 499, cond))
