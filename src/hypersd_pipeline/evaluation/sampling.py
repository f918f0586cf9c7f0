"""Images for the evaluation: the same noise for the same prompt, whatever the batch size, the model and the number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


def batches(n: int, batch_size: int) -> list[range]:
    """The numbers 0 to ``n - 1`` in batches."""
    return [range(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]


def sample(
    teacher: Teacher,
    cond: Conditioning,
    indices: range,
    timesteps: Tensor,
    *,
    seed: int,
    denoiser: Denoiser,
    eta: float = 0.0,
    to_clean: bool = False,
    variant: int = 0,
) -> Tensor:
    """One image for each of some prompts, with DDIM or, for an ``eta`` above 0, as TCDScheduler does.

    Args:
        cond: of all prompts. timesteps: int64, falling. to_clean: see `sample_ddim`.
        variant: which of the images of a prompt. Each has noise of its own.

    Returns:
        ``[b, 3, r, r]`` in [0, 1], float32.
    """

    def noise(draw: int) -> Tensor:
        return prompt_noise(indices, teacher.latent_shape, seed, draw=1000 * variant + draw).to(teacher.device)

    with torch.inference_mode():
        part = cond[slice(indices.start, indices.stop)]
        latents = sample_ddim(denoiser, noise(0), part, timesteps, eta=eta, noise=lambda step: noise(step + 1), to_clean=to_clean)
        return teacher.decode(latents)


def generate(
    teacher: Teacher, cond: Conditioning, timesteps: Tensor, *, seed: int, batch_size: int, denoiser: Denoiser | None = None, **options: Any
) -> Iterator[Tensor]:
    """Sample one image per prompt, batch by batch.

    Args:
        denoiser: the teacher's own without guidance, unless given. options: see `sample`.
    """
    for indices in batches(len(cond), batch_size):
        yield sample(teacher, cond, indices, timesteps, seed=seed, denoiser=denoiser or teacher.denoiser(), **options)
