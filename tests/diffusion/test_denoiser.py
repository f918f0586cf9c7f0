"""A network with its process: predictions, jumps and guidance."""

import pytest
import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.diffusion.guidance import guide
from hypersd_pipeline.diffusion.process import Process

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
KINDS = ("epsilon", "v_prediction", "sample")


def toy(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """A nonlinear 'network' that sees the sample, the time and the prompt of each row."""
    return torch.tanh(x_t * 0.7 + t.view(-1, 1, 1, 1) / 1000 + cond.prompt_embeds.mean((1, 2)).view(-1, 1, 1, 1))


def conditioning(n: int, sdxl: bool = False, seed: int = 0) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(n, 3, 4, generator=generator)
    return Conditioning(embeds, torch.randn(n, 5, generator=generator), torch.arange(6.0 * n).view(n, 6)) if sdxl else Conditioning(embeds)


def batch(n: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    return torch.randn(n, 4, 8, 8), torch.tensor([999, 24])[:n], conditioning(n)


def test_guidance_is_true_cfg():
    uncond, cond = torch.tensor([1.0]), torch.tensor([3.0])
    assert [guide(uncond, cond, w).item() for w in (0.0, 1.0, 3.0)] == [1.0, 3.0, 7.0]


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_guiding_raw_outputs_is_guiding_eps(kind):
    process = Process.from_config(SD, kind)
    x, out_u, out_c = torch.randn(3, 2, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([300, 999])
    eps = guide(process.to_x0_eps(out_u, x, t)[1], process.to_x0_eps(out_c, x, t)[1], 4.0)
    torch.testing.assert_close(process.to_x0_eps(guide(out_u, out_c, 4.0), x, t)[1], eps)


@pytest.mark.parametrize("sdxl", [False, True])
def test_guidance_is_one_call_on_both_halves(sdxl):
    seen = []

    def counting(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append((len(x_t), len(cond)))
        return toy(x_t, t, cond)

    x, t, cond, uncond = torch.randn(2, 4, 8, 8), torch.tensor([999, 24]), conditioning(2, sdxl), conditioning(2, sdxl, seed=1)
    w = torch.tensor([2.0, 5.0]).view(2, 1, 1, 1)
    got = Denoiser(counting, Process.from_config(SD)).guided(uncond, w).network(x, t, cond)
    assert seen == [(4, 4)]
    torch.testing.assert_close(got, toy(x, t, uncond) + w * (toy(x, t, cond) - toy(x, t, uncond)))


def test_guidance_takes_one_unconditional_for_the_whole_batch():
    (x, t, cond), one = batch(), conditioning(1, seed=1)
    denoiser = Denoiser(toy, Process.from_config(SD))
    assert torch.equal(denoiser.guided(one, 3.0).network(x, t, cond), denoiser.guided(one.expand(2), 3.0).network(x, t, cond))
    torch.testing.assert_close(denoiser.guided(one, 1.0).network(x, t, cond), toy(x, t, cond))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_is_the_converted_output(kind):
    process, (x, t, cond) = Process.from_config(SD, kind), batch()
    x0, eps = Denoiser(toy, process).predict(x, t, cond)
    expected_x0, expected_eps = process.to_x0_eps(toy(x, t, cond), x, t)
    assert torch.equal(x0, expected_x0) and torch.equal(eps, expected_eps)
    torch.testing.assert_close(process.add_noise(x0, eps, t), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_jump_is_one_ddim_step(kind):
    process, (x, t, cond) = Process.from_config(SD, kind), batch()
    denoiser, s = Denoiser(toy, process), torch.tensor([749, 0])
    x0, eps = denoiser.predict(x, t, cond)
    alpha, sigma = (table[s].view(2, 1, 1, 1) for table in (process.alphas, process.sigmas))
    torch.testing.assert_close(denoiser.jump(x, t, s, cond), (alpha * x0 + sigma * eps).float())
    torch.testing.assert_close(denoiser.jump(x, t, t, cond), x, rtol=1e-4, atol=1e-4)  # to where it stands


def test_clean_is_x0_at_one_time_for_all():
    denoiser, (x, _, cond) = Denoiser(toy, Process.from_config(SD)), batch()
    x0, _ = denoiser.predict(x, torch.tensor([800, 800]), cond)
    assert torch.equal(denoiser.clean(x, 800, cond), x0)


def test_a_half_precision_network_predicts_in_float32():
    (x, t, cond), process = batch(), Process.from_config(SD)
    denoiser = Denoiser(lambda x_t, t, c: toy(x_t, t, c).half(), process)
    x0, eps = denoiser.predict(x, t, cond)
    assert x0.dtype == eps.dtype == denoiser.jump(x, t, t, cond).dtype == torch.float32


def test_a_denoiser_in_bf16_casts_its_network_alone():
    """The product is rounded to bf16, the caller's own arithmetic is not."""
    layer = torch.nn.Linear(8, 8)
    process = Process.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "epsilon")
    denoiser = Denoiser(lambda x_t, t, cond: layer(x_t), process)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    with torch.no_grad():
        exact, rounded = (d.network(x, t, None) for d in (denoiser, denoiser.in_bf16()))
        assert rounded.dtype == torch.bfloat16 and torch.allclose(rounded.float(), exact, atol=0.05)
        assert not torch.equal(rounded.float(), exact)
        assert not torch.is_autocast_enabled("cpu") and denoiser.in_bf16(False) is denoiser
