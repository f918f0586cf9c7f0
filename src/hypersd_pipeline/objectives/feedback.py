"""Feedback learning (Hyper-SD section 3.2): what is judged, and the loss on the scores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser


def hinge(scores: Tensor, alpha: float) -> Tensor:
    """``mean(ReLU(alpha - r))`` over scores ``[b]``: zero, without gradient, for what is good enough (eq. 13)."""
    return (alpha - scores).relu().mean()


@torch.no_grad()
def advance(denoiser: Denoiser, x: Tensor, timesteps: Sequence[int], cond: Conditioning) -> Tensor:
    """Walk from ``timesteps[0]``, where ``x`` ``[b, c, h, w]`` is, to ``timesteps[-1]`` with DDIM, one network call a step. No gradient."""
    for t, s in itertools.pairwise(timesteps):
        at = torch.full((len(x),), t, device=x.device)
        x = denoiser.jump(x, at, torch.full_like(at, s), cond).to(x.dtype)
    return x
