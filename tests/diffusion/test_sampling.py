"""Guidance, sampling and conditioning."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.grids import trailing_timesteps
from hypersd_pipeline.diffusion.guidance import guide
from hypersd_pipeline.diffusion.sampling import guided_denoiser, sample_ddim
from hypersd_pipeline.diffusion.schedule import Schedule, to_x0_eps

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SCHEDULE = Schedule.from_config(SD)


def toy(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """A nonlinear 'network' that sees the sample, the time and the prompt of each row."""
    return torch.tanh(x_t * 0.7 + t.view(-1, 1, 1, 1) / 1000 + cond.prompt_embeds.mean((1, 2)).view(-1, 1, 1, 1))


def conditioning(n: int, sdxl: bool = False, seed: int = 0) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(n, 3, 4, generator=generator)
    return Conditioning(embeds, torch.randn(n, 5, generator=generator), torch.arange(6.0 * n).view(n, 6)) if sdxl else Conditioning(embeds)


def test_guidance_is_true_cfg():
    uncond, cond = torch.tensor([1.0]), torch.tensor([3.0])
    assert [guide(uncond, cond, w).item() for w in (0.0, 1.0, 3.0)] == [1.0, 3.0, 7.0]


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_guiding_raw_outputs_is_guiding_eps(kind):
    x, out_u, out_c = torch.randn(3, 2, 4, 2, 2, dtype=torch.float64)
    t = torch.tensor([300, 999])
    eps = guide(to_x0_eps(out_u, x, t, SCHEDULE, kind)[1], to_x0_eps(out_c, x, t, SCHEDULE, kind)[1], 4.0)
    torch.testing.assert_close(to_x0_eps(guide(out_u, out_c, 4.0), x, t, SCHEDULE, kind)[1], eps)


@pytest.mark.parametrize("sdxl", [False, True])
def test_guided_denoiser_is_one_call_on_both_halves(sdxl):
    seen = []

    def counting(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        seen.append((len(x_t), len(cond)))
        return toy(x_t, t, cond)

    x, t, cond, uncond = torch.randn(2, 4, 8, 8), torch.tensor([999, 24]), conditioning(2, sdxl), conditioning(2, sdxl, seed=1)
    w = torch.tensor([2.0, 5.0]).view(2, 1, 1, 1)
    got = guided_denoiser(counting, uncond, w)(x, t, cond)
    assert seen == [(4, 4)]
    torch.testing.assert_close(got, toy(x, t, uncond) + w * (toy(x, t, cond) - toy(x, t, uncond)))


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
    got = sample_ddim(toy, start, cond, trailing_timesteps(steps), SCHEDULE, kind, uncond=uncond, guidance_scale=scale)
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
    got = sample_ddim(toy, start, cond, grid, SCHEDULE, kind, eta=eta, noise=lambda step: torch.randn(start.shape, generator=ours))
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="needs noise"):
        sample_ddim(toy, start, cond, grid, SCHEDULE, kind, eta=eta)


def test_guidance_without_an_unconditional_is_refused():
    with pytest.raises(ValueError, match="unconditional"):
        sample_ddim(toy, torch.randn(1, 4, 8, 8), conditioning(1), trailing_timesteps(1), SCHEDULE, "epsilon", guidance_scale=3.0)


@pytest.mark.parametrize("sdxl", [False, True])
def test_conditioning_operations_act_on_every_part(sdxl):
    cond = conditioning(3, sdxl)
    picked = cond[torch.tensor([2, 0])]
    both = Conditioning.cat(cond, picked)
    wide = cond[1:2].expand(4)
    half = cond.to(torch.float16)
    assert (len(cond), len(picked), len(both), len(wide), len(half)) == (3, 2, 5, 4, 3)
    for name in ("prompt_embeds", "pooled", "time_ids"):
        part = getattr(cond, name)
        if part is None:
            assert not sdxl and all(getattr(c, name) is None for c in (picked, both, wide, half))
            continue
        assert torch.equal(getattr(picked, name), part[[2, 0]])
        assert torch.equal(getattr(both, name), part[[0, 1, 2, 2, 0]])
        assert torch.equal(getattr(wide, name), part[[1, 1, 1, 1]])
        assert getattr(half, name).dtype == torch.float16


def test_conditioning_becomes_the_unets_arguments():
    plain, sdxl = conditioning(2), conditioning(2, sdxl=True)
    assert list(plain.unet_kwargs()) == ["encoder_hidden_states"]
    added = sdxl.unet_kwargs()["added_cond_kwargs"]
    assert added["text_embeds"] is sdxl.pooled and added["time_ids"] is sdxl.time_ids


def test_conditioning_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="batch of one"):
        conditioning(2).expand(4)
    with pytest.raises(ValueError, match="different layouts"):
        Conditioning.cat(conditioning(1), conditioning(1, sdxl=True))
