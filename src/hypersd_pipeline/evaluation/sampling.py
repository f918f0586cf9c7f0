"""Images for the evaluation: the same noise for the same prompt, whatever the batch size, the model and the number of steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.diffusion.sampling import sample_ddim
from hypersd_pipeline.models.teacher import Teacher


def prompt_noise(indices: range, shape: tuple[int, int, int], seed: int, draw: int = 0) -> Tensor:
    """Noise ``[len(indices), c, h, w]`` float32 on the CPU: one generator per prompt and draw, seeded by (seed, index, draw)."""
    # torch's CPU generator looks at the low 32 bits of its seed only, so the two numbers are hashed into them.
    seeds = [int(np.random.SeedSequence([seed, i, *([draw] if draw else [])]).generate_state(1)[0]) for i in indices]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def generate(
    teacher: Teacher,
    cond: Conditioning,
    timesteps: Tensor,
    *,
    seed: int,
    batch_size: int,
    denoiser: Denoiser | None = None,
    eta: float = 0.0,
    to_clean: bool = False,
) -> Iterator[Tensor]:
    """Sample one image per prompt, batch by batch, with DDIM or, for an ``eta`` above 0, as TCDScheduler does.

    Args:
        timesteps: int64, falling. to_clean: see `sample_ddim`. cond: of ``n`` prompts.
        denoiser: the teacher's own without guidance, unless given.

    Yields:
        ``[b, 3, r, r]`` in [0, 1], float32.
    """
    shape, denoiser = teacher.latent_shape, denoiser or teacher.denoiser()
    for start in range(0, len(cond), batch_size):
        indices = range(start, min(start + batch_size, len(cond)))
        x_T = prompt_noise(indices, shape, seed).to(teacher.device)

        def noise(step: int, indices: range = indices) -> Tensor:
            return prompt_noise(indices, shape, seed, draw=step + 1).to(teacher.device)

        with torch.inference_mode():
            latents = sample_ddim(
                denoiser, x_T, cond[slice(indices.start, indices.stop)], timesteps, eta=eta, noise=noise, to_clean=to_clean
            )
            images = teacher.decode(latents)
        yield images
