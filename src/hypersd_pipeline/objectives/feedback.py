"""Feedback learning (Hyper-SD section 3.2): what is judged, and the losses on the judgement."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.sampling import Denoiser
from hypersd_pipeline.diffusion.schedule import PredictionType, Schedule, to_x0_eps
from hypersd_pipeline.objectives.tscd import jump


def hinge(scores: Tensor, alpha: float) -> Tensor:
    """``mean(ReLU(alpha - r))`` over scores ``[b]``: zero, without gradient, for what is good enough (eq. 13)."""
    return (alpha - scores).relu().mean()


@torch.no_grad()
def advance(
    denoiser: Denoiser, x: Tensor, timesteps: Sequence[int], cond: Conditioning, schedule: Schedule, prediction_type: PredictionType
) -> Tensor:
    """Walk from ``timesteps[0]``, where ``x`` ``[b, c, h, w]`` is, to ``timesteps[-1]`` with DDIM, one network call a step; no gradient."""
    for t, s in itertools.pairwise(timesteps):
        at = torch.full((len(x),), t, device=x.device)
        x = jump(denoiser, x, at, torch.full_like(at, s), cond, schedule, prediction_type).to(x.dtype)
    return x


def predict_clean(
    denoiser: Denoiser, x_t: Tensor, t: int, cond: Conditioning, schedule: Schedule, prediction_type: PredictionType
) -> Tensor:
    """``x0'``: the clean latents that the network sees in ``x_t`` ``[b, c, h, w]``; at least float32, with gradient."""
    at = torch.full((len(x_t),), t, device=x_t.device)
    return to_x0_eps(denoiser(x_t, at, cond), x_t, at, schedule, prediction_type)[0]
