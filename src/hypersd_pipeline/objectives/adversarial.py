"""Adversarial losses on logits, and how they are weighed against a distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Literal["softplus", "hinge", "relativistic"]


def discriminator_loss(real: Tensor, fake: Tensor, kind: Loss = "softplus") -> Tensor:
    """The discriminator's loss, the mean over ``[b]`` logits.

    - ``softplus``: ``softplus(-real) + softplus(fake)`` (non-saturating). ``2 log 2`` for one that knows nothing.
    - ``hinge``: ``relu(1 - real) + relu(1 + fake)`` (PCM, arXiv 2405.18407). 2 for one that knows nothing.
    - ``relativistic``: ``softplus(fake - real)``, each pair by itself (arXiv 1807.00734). ``log 2`` for one that knows nothing.
    """
    if kind == "hinge":
        return (1 - real).relu().mean() + (1 + fake).relu().mean()
    if kind == "relativistic":
        return F.softplus(fake - real).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor, real: Tensor | None = None, kind: Loss = "softplus") -> Tensor:
    """The student's loss, the mean over ``[b]`` logits.

    It is ``softplus(-fake)``, ``-fake`` (hinge), or ``softplus(real - fake)`` (relativistic).

    Args:
        real: logits of the real side, without a graph. Needed by the relativistic loss only.
    """
    if kind == "hinge":
        return -fake.mean()
    if kind == "relativistic":
        if real is None:
            raise ValueError("the relativistic loss compares fake logits with real ones")
        return F.softplus(real - fake).mean()
    return F.softplus(-fake).mean()


def balanced(gradient: Tensor, reference: Tensor, size: Callable[[Tensor], Tensor] = Tensor.norm, *, cap: float | None = None) -> Tensor:
    """``gradient`` scaled to the norm of ``reference``, so that a weight on it is a share. Unchanged where the reference is zero.

    Args:
        size: gives the norm over the whole batch, where both hold some of its rows only.
        cap: of the factor. A discriminator that sees nothing has next to no gradient, and without a cap its noise is blown up.
    """
    norm, wanted = size(gradient), size(reference)
    factor = wanted / norm.clamp(min=1e-20)
    factor = factor if cap is None else factor.clamp(max=cap)
    return gradient * torch.where(wanted > 0, factor, torch.ones_like(norm))
