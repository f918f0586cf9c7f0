"""Distribution matching distillation (Hyper-SD section 3.3; DMD, arXiv 2311.18828; Decoupled DMD, arXiv 2511.22677).

The student's gradient, and the critic's loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.draws import rand, randint


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


@torch.no_grad()
def guidance_gradient(x: Tensor, x0_cond: Tensor, x0_uncond: Tensor, scale: Tensor) -> Tensor:
    """What guidance adds to the matching gradient, at a noise level of its own ("CFG augmentation", arXiv 2511.22677, eq. 6 and 8).

    ``(w - 1) (x0_uncond - x0_cond) / mean|x - x0_guided|``, the mean per sample, in the signs and scale of `matching_gradient`. With one
    noise level for both, `matching_gradient` of the guided teacher is the sum of both numerators over the same mean.

    Args:
        x: the student's clean latents. x0_cond, x0_uncond: what the teacher makes of them, noised. scale: ``w`` ``[b, 1, 1, 1]``.
    """
    x, cond, uncond = x.float(), x0_cond.float(), x0_uncond.float()
    guided = uncond + scale * (cond - uncond)
    mean = (x - guided).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-8
    return torch.nan_to_num((scale - 1) * (uncond - cond) / mean, nan=0.0, posinf=0.0, neginf=0.0)


def sample_below(t: Tensor, process: Process, generator: torch.Generator, low: float, high: float) -> Tensor:
    """``s`` int64 ``[b]``, uniform over ``[low T, min(high T, t)]`` of each sample: where its content is not settled yet.

    Args:
        t: where the student stood, int64 ``[b]``. Below ``low T`` it is ``low T`` itself.
    """
    T = process.num_train_timesteps
    first = int(low * T)
    last = t.cpu().clamp(max=int(high * T)).clamp(min=first)
    return first + (rand((len(t),), generator, torch.float64) * (last - first + 1)).long()


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
