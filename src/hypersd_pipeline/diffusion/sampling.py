"""Sampling, for teachers (with guidance) and for students (without)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.guidance import guide
from hypersd_pipeline.diffusion.schedule import PredictionType, Schedule, ddim, renoise, to_x0_eps

Denoiser = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""``(x_t [b, c, h, w], t int64 [b], cond) -> raw network output [b, c, h, w]``."""


def guided_denoiser(denoiser: Denoiser, uncond: Conditioning, scale: Tensor | float) -> Denoiser:
    """A denoiser with guidance: one call on the batch of both halves. ``uncond`` has the batch of ``x_t``."""

    def call(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        output_u, output_c = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), Conditioning.cat(uncond, cond)).chunk(2)
        return guide(output_u, output_c, scale)

    return call


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser,
    x_T: Tensor,
    cond: Conditioning,
    timesteps: Tensor,
    schedule: Schedule,
    prediction_type: PredictionType,
    *,
    uncond: Conditioning | None = None,
    guidance_scale: float = 1.0,
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
    to_clean: bool = False,
) -> Tensor:
    """DDIM along falling ``timesteps``; the last step goes to the clean end ``abar[0]`` (``set_alpha_to_one=False``).

    Args:
        x_T: pure noise ``[b, c, h, w]``.
        timesteps: int64 ``[steps]``, falling.
        uncond: batch of one or of ``b``; needed where ``guidance_scale`` is not 1.
        eta: TCDScheduler's (gamma of arXiv 2402.19159), not DDIM's: each step but the last goes on to ``floor((1 - eta) s)`` and is
            noised back up to ``s``. 1 is LCM's sampling, 0 is DDIM.
        to_clean: end with the clean sample that the last call sees, as LCMScheduler does, not at ``abar[0]``.
        noise: step index -> noise ``[b, c, h, w]``; needed where ``eta`` is not 0.

    Returns:
        latents ``[b, c, h, w]`` in the dtype of ``x_T``.
    """
    if guidance_scale != 1.0:
        if uncond is None:
            raise ValueError("guidance_scale other than 1 needs the unconditional embedding")
        denoiser = guided_denoiser(denoiser, uncond.expand(len(x_T)) if len(uncond) == 1 else uncond, guidance_scale)
    if eta and noise is None:
        raise ValueError("eta other than 0 needs noise")
    x = x_T
    for i, (t, s) in enumerate(zip(timesteps.tolist(), [*timesteps[1:].tolist(), 0], strict=True)):
        at = torch.full((len(x),), t, device=x.device)
        x0, eps = to_x0_eps(denoiser(x, at, cond), x, at, schedule, prediction_type)
        if to_clean and i == len(timesteps) - 1:
            return x0.to(x_T.dtype)
        low = math.floor((1 - eta) * s)
        x = ddim(x0, eps, torch.full_like(at, low), schedule).to(x_T.dtype)
        if low < s and noise is not None:
            x = renoise(x, torch.full_like(at, low), torch.full_like(at, s), noise(i).to(x), schedule)
    return x
