"""The diffusion process that a network was trained for: noise schedule, meaning of the network's output, DDIM and re-noising."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hypersd_pipeline.diffusion import grids
from hypersd_pipeline.errors import UserError

MAX_TIMESTEPS = 100_000
PredictionType = Literal["epsilon", "v_prediction", "sample"]


class Process:
    """The variance-preserving process: ``alpha_t = sqrt(abar_t)`` and ``sigma_t = sqrt(1 - abar_t)`` for ``t = 0 .. T-1``.

    Each formula of the process exists here and nowhere else. Timesteps are int64 ``[b]``. Samples are ``[b, c, h, w]``.

    Attributes:
        alphas, sigmas: ``[T]`` float64. The clean end of the grid is ``abar[0]`` (0.99915 for Stable Diffusion), not 1.
        prediction_type: what the network puts out.
    """

    def __init__(self, betas: Tensor, prediction_type: PredictionType = "epsilon") -> None:
        if prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"unknown prediction_type {prediction_type!r}")
        alphas_cumprod = torch.cumprod(1.0 - betas.double(), dim=0)
        self.alphas = alphas_cumprod.sqrt()
        self.sigmas = (1.0 - alphas_cumprod).sqrt()
        self.prediction_type: PredictionType = prediction_type
        self._device_tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], prediction_type: PredictionType = "epsilon") -> Process:
        """Build from a diffusers scheduler config.

        Raises:
            UserError: the beta schedule is not one that Stable Diffusion teachers use, or its numbers make no noise schedule.
        """
        if config.get("rescale_betas_zero_snr"):
            raise UserError(
                "scheduler_config.json: rescale_betas_zero_snr is set; zero-terminal-SNR teachers are not supported, use one without it."
            )
        return cls(_betas(config), prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        """``T``."""
        return len(self.alphas)

    @property
    def last_timestep(self) -> int:
        """``T - 1``, where sampling starts from pure noise."""
        return len(self.alphas) - 1

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha_t`` and ``sigma_t`` as float64 ``[b, 1, 1, 1]`` on the device of ``like``."""
        if t.dtype != torch.int64 or t.ndim != 1 or len(t) != len(like):
            raise ValueError(f"timesteps must be int64 [{len(like)}], got {t.dtype} {tuple(t.shape)}")
        if like.device not in self._device_tables:
            self._device_tables[like.device] = (self.alphas.to(like.device), self.sigmas.to(like.device))
        shape = (-1, *[1] * (like.ndim - 1))
        alphas, sigmas = self._device_tables[like.device]
        return alphas[t].view(shape), sigmas[t].view(shape)

    def angle(self, t: Tensor, like: Tensor) -> Tensor:
        """The angle ``a`` with ``alpha_t = cos a`` and ``sigma_t = sin a``, float64 ``[b, 1, 1, 1]``: TrigFlow's time for unit noise."""
        alpha, sigma = self.alpha_sigma(t, like)
        return torch.atan2(sigma, alpha)

    def pace(self, t: Tensor, like: Tensor) -> Tensor:
        """Timesteps per radian of `angle` at ``t``, float64 ``[b, 1, 1, 1]``: by central differences, one-sided at both ends."""
        above, below = (t + 1).clamp(max=self.last_timestep), (t - 1).clamp(min=0)
        steps = (above - below).view(-1, *[1] * (like.ndim - 1))
        return steps / (self.angle(above, like) - self.angle(below, like))

    @staticmethod
    def velocity(x0: Tensor, eps: Tensor, angle: Tensor) -> Tensor:
        """``dx / da`` of the probability-flow ODE in TrigFlow's time: ``cos a eps - sin a x0``. float64."""
        return angle.cos() * eps.double() - angle.sin() * x0.double()

    def add_noise(self, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """``x_t = alpha_t x0 + sigma_t z``."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return (alpha * x0 + sigma * z).to(x0.dtype)

    def to_x0_eps(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a raw network output into the clean sample and the noise that it implies.

        Returns:
            ``(x0, eps)`` in at least float32. A half-precision x0 at a large ``t`` is useless, because it is divided by alpha.
        """
        return self.converted(output, x_t, *self.alpha_sigma(t, x_t))

    def converted(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """`to_x0_eps` at any point of the process, between two timesteps too: ``alpha`` and ``sigma`` float64 ``[b, 1, 1, 1]``."""
        dtype = torch.promote_types(output.dtype, torch.float32)
        x, out = x_t.double(), output.double()
        if self.prediction_type == "epsilon":
            x0, eps = (x - sigma * out) / alpha, out
        elif self.prediction_type == "v_prediction":  # v = alpha eps - sigma x0
            x0, eps = alpha * x - sigma * out, alpha * out + sigma * x
        else:
            x0, eps = out, (x - alpha * out) / sigma
        return x0.to(dtype), eps.to(dtype)

    def ddim(self, x0: Tensor, eps: Tensor, s: Tensor) -> Tensor:
        """The deterministic solver Psi (DDIM, eta 0): ``alpha_s x0 + sigma_s eps``. With ``s = t`` it is the identity on ``x_t``."""
        return self.add_noise(x0, eps, s)

    def renoise(self, x_s: Tensor, s: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Bring a sample from noise level ``s`` up to ``t >= s``: ``r x_s + sqrt(sigma_t^2 - r^2 sigma_s^2) z``, ``r = alpha_t / alpha_s``.

        With ``t = s`` it is the identity.
        """
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.alpha_sigma(s, x_s), self.alpha_sigma(t, x_s)
        ratio = alpha_t / alpha_s
        return (ratio * x_s + (sigma_t**2 - (ratio * sigma_s) ** 2).clamp(min=0).sqrt() * z).to(x_s.dtype)

    def solver_grid(self, points: int) -> Tensor:
        """See `grids.solver_grid`."""
        return grids.solver_grid(points, self.num_train_timesteps)

    def boundaries(self, segments: int) -> Tensor:
        """See `grids.boundaries`."""
        return grids.boundaries(segments, self.num_train_timesteps)

    def trailing_timesteps(self, steps: int) -> Tensor:
        """See `grids.trailing_timesteps`."""
        return grids.trailing_timesteps(steps, self.num_train_timesteps)


def _betas(config: Mapping[str, Any]) -> Tensor:
    """The noise that is added at each timestep, float64 ``[T]``: between 0 and 1, and something of the image is left at the end."""
    T, trained = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if isinstance(T, bool) or not isinstance(T, int) or not 2 <= T <= MAX_TIMESTEPS:
        raise _fault(f"num_train_timesteps is {T!r}, not a whole number from 2 to {MAX_TIMESTEPS}")
    if trained is not None:
        if not isinstance(trained, list | tuple) or len(trained) != T or not all(_is_beta(beta) for beta in trained):
            raise _fault(f"trained_betas is no list of {T} numbers between 0 and 1, one for each of num_train_timesteps")
        betas = torch.as_tensor(np.asarray(trained, dtype=np.float64))
    else:
        start, end, kind = config.get("beta_start", 1e-4), config.get("beta_end", 0.02), config.get("beta_schedule", "linear")
        for name, beta in (("beta_start", start), ("beta_end", end)):
            if not _is_beta(beta):
                raise _fault(f"{name} is {beta!r}, not a number between 0 and 1")
        if kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(start, end, T, dtype=torch.float64)
        else:
            raise UserError(f"scheduler_config.json: beta_schedule is {kind!r}; use a teacher with 'scaled_linear' or 'linear'.")
    if float((1 - betas).prod()) < 1e-12:  # the noise is divided by its square root. Stable Diffusion's is 0.0047
        raise _fault(f"the betas leave nothing of the image after {T} timesteps")
    return betas


def _is_beta(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


def _fault(problem: str) -> UserError:
    return UserError(f"scheduler_config.json: {problem}; fetch the teacher's scheduler again or correct it.")
