"""Distribution matching distillation (Hyper-SD section 3.3; DMD, arXiv 2311.18828): the student's gradient, and the critic's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.draws import randint


def sample_renoise_timesteps(batch: int, process: Process, generator: torch.Generator, low: float = 0.02, high: float = 0.98) -> Tensor:
    """``t ~ U[low T, high T]`` int64 ``[b]``, where the student's samples are judged: neither nearly clean nor nearly noise."""
    T = process.num_train_timesteps
    return randint(int(low * T), int(high * T) + 1, (batch,), generator)


@torch.no_grad()
def matching_gradient(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """``(p_real - p_fake) / mean|p_real|`` with ``p = x - x0``, the mean per sample. ``[b, c, h, w]`` float32, zero where not finite.

    Args:
        x: the student's clean latents. x0_real, x0_fake: what the teacher (with guidance) and the critic (without) make of them, noised.
    """
    x, real, fake = x.float(), x0_real.float(), x0_fake.float()
    p_real, p_fake = x - real, x - fake
    scale = p_real.abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-8
    return torch.nan_to_num((p_real - p_fake) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def matching_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """``0.5 * MSE(x, stopgrad(x - grad))``: its gradient at ``x`` is ``grad`` over the number of elements."""
    x = x.float()
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def critic_loss(eps: Tensor, z: Tensor) -> Tensor:
    """The denoising loss of the critic on the student's noised samples: squared error of the noise.

    Args:
        eps: the noise that the critic sees ``[b, c, h, w]``. z: the noise that was added.
    """
    return (eps - z.float()).square().mean()
