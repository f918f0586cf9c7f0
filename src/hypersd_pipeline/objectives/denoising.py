"""The denoising loss on which a diffusion model is trained."""

from __future__ import annotations

from torch import Tensor

from hypersd_pipeline.diffusion.process import Process


def epsilon_loss(output: Tensor, z: Tensor, t: Tensor, process: Process, gamma: float) -> Tensor:
    """Squared error of the noise prediction with min-SNR weights ``min(snr_t, gamma) / snr_t`` (arXiv 2303.09556).

    Args:
        output: predicted noise ``[b, c, h, w]``.
        z: the noise that was added, ``[b, c, h, w]``.
        t: int64 ``[b]`` in ``[0, T)``.
        process: gives ``snr_t = (alpha_t / sigma_t)^2``.
        gamma: the largest signal-to-noise ratio that keeps its full weight in the loss on ``x0``.
    """
    alpha, sigma = process.alpha_sigma(t, z)
    snr = ((alpha / sigma) ** 2).flatten().float()
    return (snr.clamp(max=gamma) / snr * (output - z).square().mean(dim=(1, 2, 3))).mean()
