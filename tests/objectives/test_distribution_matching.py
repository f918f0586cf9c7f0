"""Distribution matching by hand: the gradient, who gets it, and the critic's loss."""

import pytest
import torch

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.objectives import distribution_matching as dm

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROCESS = Process.from_config(SD)


def test_gradient_by_hand():
    x = torch.tensor([[[[1.0, 2.0]]], [[[10.0, 20.0]]]])
    real = torch.tensor([[[[0.0, 4.0]]], [[[0.0, 40.0]]]])  # p_real: (1, -2), (10, -20). Mean |p_real|: 1.5, 15
    fake = torch.tensor([[[[0.5, 2.0]]], [[[5.0, 20.0]]]])  # p_fake: (.5, 0), (5, 0)
    expected = torch.tensor([[[[0.5 / 1.5, -2 / 1.5]]], [[[5 / 15, -20 / 15]]]])
    assert torch.allclose(dm.matching_gradient(x, real, fake), expected)  # the scale of a sample does not matter


def test_guidance_by_hand():
    x = torch.tensor([[[[1.0, 2.0]]]])
    cond, uncond = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[1.0, 1.0]]]])  # guided, w = 3: (4, -2). |x - guided|: 3, 4
    found = dm.guidance_gradient(x, cond, uncond, torch.full((1, 1, 1, 1), 3.0))
    assert torch.allclose(found, torch.tensor([[[[2 * -1 / 3.5, 2 * 1 / 3.5]]]]))
    assert not dm.guidance_gradient(x, cond, uncond, torch.ones(1, 1, 1, 1)).any()


def test_at_one_noise_level_matching_and_guidance_add_up_to_the_guided_gradient():
    """Equation 6 of Decoupled DMD: the numerators, over the guided teacher's mean."""
    g = torch.Generator().manual_seed(0)
    x, cond, uncond, fake = (torch.randn(3, 2, 4, 4, generator=g) for _ in range(4))
    scale = torch.tensor([1.0, 3.0, 7.5]).view(-1, 1, 1, 1)
    guided = uncond + scale * (cond - uncond)

    def mean(real):
        return (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)

    parts = dm.matching_gradient(x, cond, fake) * mean(cond) + dm.guidance_gradient(x, cond, uncond, scale) * mean(guided)
    assert torch.allclose(dm.matching_gradient(x, guided, fake) * mean(guided), parts, atol=1e-5)


def test_noise_levels_of_guidance_end_where_the_student_stood():
    t = torch.tensor([799, 300, 10]).repeat(20_000)
    drawn = dm.sample_below(t, PROCESS, torch.Generator().manual_seed(0), 0.02, 0.5).view(-1, 3)
    assert drawn.min(dim=0).values.tolist() == [20, 20, 20] and drawn.max(dim=0).values.tolist() == [500, 300, 20]
    assert torch.allclose(drawn.double().mean(dim=0), torch.tensor([260.0, 160.0, 20.0]).double(), atol=3)


def test_gradient_is_zero_for_a_matching_critic_and_where_it_is_not_finite():
    x, real = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    assert not dm.matching_gradient(x, real, real).any()
    broken = real.clone()
    broken[1, 0, 0, 0] = float("nan")
    gradient = dm.matching_gradient(x, broken, real + 1)
    assert torch.isfinite(gradient).all() and gradient[0].any()


def test_the_loss_carries_the_gradient_to_the_student_alone():
    x = torch.randn(2, 1, 2, 2, requires_grad=True)
    real, fake = (torch.randn(2, 1, 2, 2, requires_grad=True) for _ in range(2))
    gradient = dm.matching_gradient(x, real, fake)
    dm.matching_loss(x, gradient).backward()
    assert torch.allclose(x.grad, gradient / x.numel(), atol=1e-6)
    assert real.grad is None and fake.grad is None


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_critic_loss_is_zero_for_the_right_answer_and_leaves_the_student_alone(kind):
    process, cond = Process.from_config(SD, kind), Conditioning(torch.zeros(3, 1, 1))
    x = torch.randn(3, 1, 2, 2, requires_grad=True)
    z, t = torch.randn(3, 1, 2, 2), torch.tensor([20, 500, 980])
    alpha, sigma = (part.float() for part in process.alpha_sigma(t, x))
    right = z if kind == "epsilon" else alpha * z - sigma * x.detach()
    x_t = process.add_noise(x.detach(), z, t)
    assert torch.isfinite(x_t).all()

    def loss_of(output):
        return dm.critic_loss(Denoiser(lambda x_t, t, cond: output, process).predict(x_t, t, cond)[1], z)

    assert loss_of(right).item() == pytest.approx(0, abs=1e-6)
    output = (right + 0.5 if kind == "epsilon" else right).clone().requires_grad_()
    loss = loss_of(output)
    loss.backward()
    assert x.grad is None and output.grad is not None
    if kind == "epsilon":
        assert loss.item() == pytest.approx(0.25, rel=1e-4)


def test_renoise_timesteps_keep_away_from_both_ends():
    t = dm.sample_renoise_timesteps(20000, PROCESS, torch.Generator().manual_seed(0))
    assert (int(t.min()), int(t.max())) == (20, 980) and t.dtype == torch.int64
