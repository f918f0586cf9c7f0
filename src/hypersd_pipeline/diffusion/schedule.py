"""The variance-preserving noise schedule, the conversion of network outputs, and the DDIM step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hypersd_pipeline.errors import UserError

PredictionType = Literal["epsilon", "v_prediction", "sample"]


class Schedule:
    """``alpha_t = sqrt(abar_t)`` and ``sigma_t = sqrt(1 - abar_t)`` for ``t = 0 .. T-1``, kept in float64.

    Attributes:
        alphas, sigmas: ``[T]`` float64. The clean end of the grid is ``abar[0]`` (0.99915 for Stable Diffusion), not 1.
    """

    def __init__(self, betas: Tensor) -> None:
        alphas_cumprod = torch.cumprod(1.0 - betas.double(), dim=0)
        self.alphas = alphas_cumprod.sqrt()
        self.sigmas = (1.0 - alphas_cumprod).sqrt()
        self._device_tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Build from a diffusers scheduler config.

        Raises:
            UserError: the beta schedule is not one that Stable Diffusion teachers use.
        """
        T, start, end = config.get("num_train_timesteps", 1000), config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
        kind = config.get("beta_schedule", "linear")
        if config.get("rescale_betas_zero_snr"):
            raise UserError(
                "scheduler_config.json: rescale_betas_zero_snr is set; zero-terminal-SNR teachers are not supported, use one without it."
            )
        if config.get("trained_betas") is not None:
            return cls(torch.as_tensor(np.asarray(config["trained_betas"]), dtype=torch.float64))
        if kind == "scaled_linear":
            return cls(torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2)
        if kind == "linear":
            return cls(torch.linspace(start, end, T, dtype=torch.float64))
        raise UserError(f"scheduler_config.json: beta_schedule is {kind!r}; use a teacher with 'scaled_linear' or 'linear'.")

    @property
    def num_train_timesteps(self) -> int:
        """``T``."""
        return len(self.alphas)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha_t`` and ``sigma_t`` as float64 ``[b, 1, 1, 1]`` on the device of ``like``; ``t`` is int64 ``[b]``."""
        if t.dtype != torch.int64 or t.ndim != 1 or len(t) != len(like):
            raise ValueError(f"timesteps must be int64 [{len(like)}], got {t.dtype} {tuple(t.shape)}")
        if like.device not in self._device_tables:
            self._device_tables[like.device] = (self.alphas.to(like.device), self.sigmas.to(like.device))
        shape = (-1, *[1] * (like.ndim - 1))
        alphas, sigmas = self._device_tables[like.device]
        return alphas[t].view(shape), sigmas[t].view(shape)


def add_noise(x0: Tensor, z: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """``x_t = alpha_t x0 + sigma_t z``; ``x0``, ``z`` ``[b, c, h, w]``, ``t`` int64 ``[b]``."""
    alpha, sigma = schedule.at(t, x0)
    return (alpha * x0 + sigma * z).to(x0.dtype)


def to_x0_eps(output: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, prediction_type: PredictionType) -> tuple[Tensor, Tensor]:
    """Turn a raw network output into the clean sample and the noise it implies.

    Args:
        output, x_t: ``[b, c, h, w]``; ``t``: int64 ``[b]``.

    Returns:
        ``(x0, eps)`` in at least float32 (half-precision x0 at large t is useless: it divides by alpha).
    """
    alpha, sigma = schedule.at(t, x_t)
    dtype = torch.promote_types(output.dtype, torch.float32)
    x, out = x_t.double(), output.double()
    if prediction_type == "epsilon":
        x0, eps = (x - sigma * out) / alpha, out
    elif prediction_type == "v_prediction":  # v = alpha eps - sigma x0
        x0, eps = alpha * x - sigma * out, alpha * out + sigma * x
    elif prediction_type == "sample":
        x0, eps = out, (x - alpha * out) / sigma
    else:
        raise ValueError(f"unknown prediction_type {prediction_type!r}")
    return x0.to(dtype), eps.to(dtype)


def ddim(x0: Tensor, eps: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """The deterministic solver Psi (DDIM, eta 0): ``alpha_s x0 + sigma_s eps``. With ``s = t`` it is the identity on ``x_t``."""
    return add_noise(x0, eps, s, schedule)


def renoise(x_s: Tensor, s: Tensor, t: Tensor, z: Tensor, schedule: Schedule) -> Tensor:
    """Bring a sample from noise level ``s`` up to ``t >= s``: ``r x_s + sqrt(sigma_t^2 - r^2 sigma_s^2) z`` with ``r = alpha_t / alpha_s``.

    ``x_s``, ``z`` ``[b, c, h, w]``; ``s``, ``t`` int64 ``[b]``. With ``t = s`` it is the identity.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.at(s, x_s), schedule.at(t, x_s)
    ratio = alpha_t / alpha_s
    return (ratio * x_s + (sigma_t**2 - (ratio * sigma_s) ** 2).clamp(min=0).sqrt() * z).to(x_s.dtype)
