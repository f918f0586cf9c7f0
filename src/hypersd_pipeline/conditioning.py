"""What the UNet is conditioned on, for both teacher layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Conditioning of a batch of ``b`` samples.

    Attributes:
        prompt_embeds: ``[b, L, D]``, the text encoders' hidden states.
        pooled: ``[b, P]``, SDXL's pooled text embedding; None for the SD1.5 layout.
        time_ids: ``[b, 6]``, SDXL's sizes and crop; None for the SD1.5 layout.
    """

    prompt_embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled, time_ids = (None if x is None else fn(x) for x in (self.pooled, self.time_ids))
        return Conditioning(fn(self.prompt_embeds), pooled, time_ids)

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def __getitem__(self, index: Tensor | slice) -> Conditioning:
        return self._map(lambda x: x[index])

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """As ``Tensor.to``, on every part."""
        return self._map(lambda x: x.to(*args, **kwargs))

    def expand(self, n: int) -> Conditioning:
        """Repeat a batch of one ``n`` times, without copying."""
        if len(self) != 1:
            raise ValueError(f"expand needs a batch of one, got {len(self)}")
        return self._map(lambda x: x.expand(n, *x.shape[1:]))

    @staticmethod
    def cat(*parts: Conditioning) -> Conditioning:
        """Concatenate along the batch; all parts have the same layout."""

        def join(tensors: list[Tensor | None]) -> Tensor | None:
            present = [x for x in tensors if x is not None]
            if present and len(present) != len(tensors):
                raise ValueError("cannot concatenate conditionings of different layouts")
            return torch.cat(present) if present else None

        embeds = torch.cat([p.prompt_embeds for p in parts])
        return Conditioning(embeds, join([p.pooled for p in parts]), join([p.time_ids for p in parts]))

    def unet_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for diffusers' ``UNet2DConditionModel.forward``."""
        kwargs: dict[str, Any] = {"encoder_hidden_states": self.prompt_embeds}
        if self.pooled is not None:
            kwargs["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        return kwargs
