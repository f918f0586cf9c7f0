"""The discriminator's head: a small convolutional network with one logit, on the teacher's features (SDXL-Lightning, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """Blocks of 4 x 4 convolution with stride 2, GroupNorm(32) and SiLU down to at most 2 x 2, then one logit, averaged over what is left.

    Its depth follows the features that it gets. Features of a single position take a 1 x 1 convolution in place of the first block's.

    Args:
        channels: of the features, both points of the pair together. size: the smaller of their height and width.
        hidden: channels inside, a multiple of 32.
        norm: ``none`` leaves the group normalisation out. It takes away the scale of the features, in which an error of the student shows.
    """

    def __init__(self, channels: int, size: int, hidden: int, norm: Literal["group", "none"] = "group") -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while not layers or size > 2:
            wide: dict[str, Any] = {"kernel_size": 4, "stride": 2, "padding": 1} if size > 1 else {"kernel_size": 1}
            groups = 32 if size > 3 else min(32, hidden // 2)  # a group of one value, at one position, would be zero whatever it was
            normalised = [nn.GroupNorm(groups, hidden)] if norm == "group" else []
            layers += [nn.Conv2d(channels, hidden, **wide), *normalised, nn.SiLU()]
            channels, size = hidden, size // 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(hidden, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """``[b, channels, h, w]`` -> logits ``[b]``, float32. Above zero is "real"."""
        with torch.autocast(features.device.type, enabled=False):
            return self.layers(features.float()).mean(dim=(1, 2, 3))


class Heads(nn.Module):
    """A head for each level of features. The logit is their mean."""

    def __init__(self, heads: Sequence[Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, *levels: Tensor) -> Tensor:
        """Features ``[b, C_i, h_i, w_i]`` of each level -> logits ``[b]``, float32."""
        return torch.stack([head(features) for head, features in zip(self.heads, levels, strict=True)]).mean(dim=0)


def make_head(
    feature_shapes: Sequence[tuple[int, int, int]], hidden: int, points: int, seed: int, norm: Literal["group", "none"] = "group"
) -> Head | Heads:
    """A head, initialised from the seed, for features ``(C, h, w)`` of each level, of ``points`` (1 or 2) noisy samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = [Head(points * channels, min(height, width), hidden, norm) for channels, height, width in feature_shapes]
    return heads[0] if len(heads) == 1 else Heads(heads)
