"""Classifier-free guidance."""

from torch import Tensor


def guide(uncond: Tensor, cond: Tensor, scale: Tensor | float) -> Tensor:
    """``uncond + w (cond - uncond)``: ``w = 1`` is the conditional output itself (LCM's script writes the same thing with ``1 + w``)."""
    return uncond + scale * (cond - uncond)
