"""Re-noising from one level up to another."""

import pytest
import torch

from hypersd_pipeline.diffusion.process import Process


def test_renoise_meets_the_forward_process():
    process = Process.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    x0, a, b = (torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    s, t = torch.full((2000,), 249), torch.full((2000,), 700)
    x_s = process.add_noise(x0, a, s)
    assert torch.equal(process.renoise(x_s, s, s, b), x_s)
    moved = process.renoise(x_s, s, t, b)
    alpha, sigma = process.alpha_sigma(t[:1], x0[:1])
    assert (moved - alpha.float() * x0).std().item() == pytest.approx(float(sigma), rel=0.02)
