"""The pairwise ranking loss on which reward models are trained."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def ranking_loss(win: Tensor, lose: Tensor) -> Tensor:
    """``-log sigmoid(r(win) - r(lose))``, the mean over ``[b]`` (Hyper-SD eq. 9).

    Args:
        win: scores ``[b]`` of the preferred members.
        lose: scores ``[b]`` of the other members.

    Returns:
        A scalar, at least zero, and ``log 2`` where both members score the same.
    """
    return F.softplus(lose - win).mean()
