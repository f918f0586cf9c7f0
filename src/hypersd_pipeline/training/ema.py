"""Exponential moving average of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update(targets: Sequence[Tensor], sources: Sequence[Tensor], decay: float) -> None:
    """``target <- decay target + (1 - decay) source``, in place, for lists of tensors of the same shapes (Hyper-SD algorithm 1)."""
    here = [source.to(target.device) for target, source in zip(targets, sources, strict=True)]  # the average may be kept on the CPU
    torch._foreach_lerp_(list(targets), here, 1.0 - decay)
