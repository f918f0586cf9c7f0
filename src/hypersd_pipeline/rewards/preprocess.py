"""CLIP's and BLIP's image preprocessing on tensors, differentiable."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hypersd_pipeline.rewards.base import straight_through_clamp

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased. What overshoots is clipped, as 8-bit images would."""
    images = straight_through_clamp(images)
    if images.shape[-2:] == (height, width):
        return images
    return straight_through_clamp(F.interpolate(images, size=(height, width), mode="bicubic", antialias=True, align_corners=False))


def _normalise(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def crop_preprocess(images: Tensor, size: int) -> Tensor:
    """Shorter side to ``size`` (bicubic), centre square, CLIP's mean and deviation: torchvision's Resize, CenterCrop, Normalize.

    Args:
        images: ``[b, 3, h, w]`` in [0, 1]. What lies outside is clipped straight-through.

    Returns:
        ``[b, 3, size, size]``.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    height, width = (size if side == short else int(size * side / short) for side in (height, width))
    images = _bicubic(images, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _normalise(images[..., top : top + size, left : left + size])


def pad_preprocess(images: Tensor, size: int) -> Tensor:
    """Longer side to ``size`` (bicubic), black bars to a square, CLIP's mean and deviation: HPSv2's. As `crop_preprocess` for squares."""
    height, width = images.shape[-2:]
    height, width = (round(side * size / max(images.shape[-2:])) for side in (height, width))
    images = _bicubic(images, height, width)
    left, top = (size - width) // 2, (size - height) // 2
    return _normalise(F.pad(images, (left, size - width - left, top, size - height - top)))
