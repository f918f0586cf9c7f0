"""What a reward is, and how pixels come to it without losing their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Reward(Protocol):
    """A frozen, differentiable judge of images. Each implementation's docstring gives the range of its scores.

    Attributes:
        name: for metric names and reports. Equal to the configuration's ``kind``.
    """

    name: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of images, higher is better.

        Args:
            images: float ``[b, 3, h, w]``, meant to be in [0, 1]. What lies outside is scored as if clipped, and still gets gradient.
            prompts: ``b`` of them. Rewards of the image alone ignore them.

        Returns:
            ``[b]``. Gradients flow to ``images`` and to nothing else.
        """
        ...


class _StraightThroughClamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def straight_through_clamp(images: Tensor) -> Tensor:
    """``images`` clipped to [0, 1], with the gradient of the identity.

    A plain clamp gives saturated pixels no gradient, so that a reward could never bring them back.
    """
    return _StraightThroughClamp.apply(images)  # type: ignore[no-untyped-call]


def check_images_and_prompts(images: Tensor, prompts: Sequence[str]) -> None:
    """Raises ValueError unless there are ``b`` float images ``[b, 3, h, w]`` and ``b`` prompts."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"a reward needs float images [b, 3, h, w], got {images.dtype} {tuple(images.shape)}")
    if len(prompts) != len(images):
        raise ValueError(f"a reward needs a prompt for each image, got {len(prompts)} for {len(images)}")
