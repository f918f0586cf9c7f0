"""Sampling, for teachers (with guidance) and for students (without)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser


@torch.no_grad()
def sample_ddim(
    denoiser: Denoiser,
    x_T: Tensor,
    cond: Conditioning,
    timesteps: Tensor,
    *,
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
    to_clean: bool = False,
) -> Tensor:
    """DDIM along falling ``timesteps``. The last step goes to the clean end ``abar[0]`` (``set_alpha_to_one=False``).

    Args:
        denoiser: with guidance where it is `Denoiser.guided`.
        x_T: pure noise ``[b, c, h, w]``.
        timesteps: int64 ``[steps]``, falling.
        eta: TCDScheduler's (gamma of arXiv 2402.19159), not DDIM's: each step but the last goes on to ``floor((1 - eta) s)`` and is
            noised back up to ``s``. 1 is LCM's sampling, 0 is DDIM.
        noise: step index -> noise ``[b, c, h, w]``. Needed where ``eta`` is not 0.
        to_clean: end with the clean sample that the last call sees, as LCMScheduler does, not at ``abar[0]``.

    Returns:
        latents ``[b, c, h, w]`` in the dtype of ``x_T``.
    """
    if eta and noise is None:
        raise ValueError("eta other than 0 needs noise")
    x, process = x_T, denoiser.process
    for i, (t, s) in enumerate(zip(timesteps.tolist(), [*timesteps[1:].tolist(), 0], strict=True)):
        at = torch.full((len(x),), t, device=x.device)
        x0, eps = denoiser.predict(x, at, cond)
        if to_clean and i == len(timesteps) - 1:
            return x0.to(x_T.dtype)
        low = math.floor((1 - eta) * s)
        x = process.ddim(x0, eps, torch.full_like(at, low)).to(x_T.dtype)
        if low < s and noise is not None:
            x = process.renoise(x, torch.full_like(at, low), torch.full_like(at, s), noise(i).to(x))
    return x
