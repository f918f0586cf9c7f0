"""What a network is conditioned on, for all teacher layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Movable = TypeVar("Movable", Tensor, "Conditioning")

UNWAITED = {"cuda"}
"""Kinds of devices that copy from pinned memory while the CPU goes on."""


def moved(x: Movable, device: torch.device) -> Movable:
    """On the device. To a GPU through pinned memory, so that nobody waits for the copy, nor for all that was queued before it."""
    if isinstance(x, Conditioning):
        return x.sent(device)
    if x.device.type != "cpu" or device.type not in UNWAITED:
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)  # what is expanded cannot be pinned


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of a batch of ``b`` samples.

    Attributes:
        prompt_embeds: ``[b, L, D]``, the text encoders' hidden states.
        pooled: ``[b, P]``, SDXL's pooled text embedding. None for the SD1.5 layout.
        sizes: ``[b, 6]``, SDXL's size conditioning (see `size_conditioning`). None for the SD1.5 layout.
    """

    prompt_embeds: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled, sizes = (None if x is None else fn(x) for x in (self.pooled, self.sizes))
        return Conditioning(fn(self.prompt_embeds), pooled, sizes)

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        return self._map(lambda x: x[index])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """As ``Tensor.to``, on every part."""
        return self._map(lambda x: x.to(*args, **kwargs))

    def sent(self, device: torch.device) -> Conditioning:
        """Every part `moved`."""
        return self._map(lambda x: moved(x, device))

    def expand(self, n: int) -> Conditioning:
        """Repeat a batch of one ``n`` times, without copying."""
        if len(self) != 1:
            raise ValueError(f"expand needs a batch of one, got {len(self)}")
        return self._map(lambda x: x.expand(n, *x.shape[1:]))

    @staticmethod
    def cat(*parts: Conditioning) -> Conditioning:
        """Concatenate along the batch. All parts have the same layout."""

        def join(tensors: list[Tensor | None]) -> Tensor | None:
            present = [x for x in tensors if x is not None]
            if present and len(present) != len(tensors):
                raise ValueError("cannot concatenate conditionings of different layouts")
            return torch.cat(present) if present else None

        embeds = torch.cat([p.prompt_embeds for p in parts])
        return Conditioning(embeds, join([p.pooled for p in parts]), join([p.sizes for p in parts]))


def size_conditioning(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """SDXL's size conditioning, float32 ``[6]``: (height, width) as found, (top, left) of the crop, (height, width) that the VAE sees."""
    return torch.tensor([*original, *crop, *target], dtype=torch.float32)
