"""The contrastive loss of image and text embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric InfoNCE: the mean cross-entropy from image to text and from text to image (CLIP, arXiv 2103.00020).

    Args:
        image: unit vectors ``[b, d]``.
        text: unit vectors ``[b, d]``, one for each image.
        scale: the inverse temperature, a scalar above zero.
        same: bool ``[b, b]``, pairs with an equal caption. Off the diagonal they are no negatives.

    Returns:
        A scalar, at least zero.
    """
    logits = (scale * image @ text.T).masked_fill(same & ~torch.eye(len(image), dtype=torch.bool, device=image.device), -torch.inf)
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
