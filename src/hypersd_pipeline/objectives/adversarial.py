"""Non-saturating adversarial losses on logits, and how they are weighed against a distance."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``softplus(-real) + softplus(fake)``, each the mean over ``[b]`` logits. ``2 log 2`` for one that knows nothing."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """``softplus(-fake)``, the mean over ``[b]`` logits (non-saturating)."""
    return F.softplus(-fake).mean()


def balanced(gradient: Tensor, reference: Tensor, size: Callable[[Tensor], Tensor] = Tensor.norm) -> Tensor:
    """``gradient`` scaled to the norm of ``reference``, so that a weight on it is a share. Unchanged where the reference is zero.

    Args:
        size: gives the norm over the whole batch, where both hold some of its rows only.
    """
    norm, wanted = size(gradient), size(reference)
    return gradient * torch.where(wanted > 0, wanted / norm.clamp(min=1e-20), torch.ones_like(norm))
