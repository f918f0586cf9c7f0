"""Feedback's objectives by hand: the hinge, and the walk against diffusers' DDIM."""

import pytest
import torch
from diffusers import DDIMScheduler

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.objectives import feedback


def test_hinge_by_hand():
    scores = torch.tensor([1.0, 3.0, 2.5], requires_grad=True)
    loss = feedback.hinge(scores, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(1 / 3)
    assert scores.grad.tolist() == pytest.approx([-1 / 3, 0.0, 0.0])  # nothing above alpha


def test_the_walk_is_the_students_own_few_step_sampling():
    """From 999 to 249 on the trailing grid of four steps, as diffusers' DDIM goes."""
    process = Process.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(4)
    network = lambda x, t, cond: torch.tanh(x) + t.view(-1, 1, 1, 1) / 1000  # noqa: E731
    denoiser = Denoiser(network, process)
    x = start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = Conditioning(torch.zeros(2, 1, 1))
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(network(x, t.expand(2), cond), t, x).prev_sample
    walked = feedback.advance(denoiser, start, [999, 749, 499, 249], cond)
    torch.testing.assert_close(walked, x, rtol=1e-4, atol=1e-5)
    clean = denoiser.clean(walked, 249, cond)
    at = torch.full((2,), 249)
    torch.testing.assert_close(process.ddim(clean, network(walked, at, cond), at), walked)
    assert torch.equal(feedback.advance(denoiser, start, [999], cond), start)
