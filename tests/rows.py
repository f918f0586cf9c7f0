"""Rows of a training split in memory, as `hypersd_pipeline.data.cache.SplitCache` gives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning


@dataclass
class Rows:
    """``latents [n, c, h, w]`` without posterior, one caption each, and the unconditional embedding (a batch of one)."""

    latents: Tensor
    cond: Conditioning
    uncond: Conditioning
    texts: list[str]

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return tuple(self.latents.shape[1:])

    def sample(self, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.latents[indices]

    def conditioning(self, indices: Tensor, generator: torch.Generator | None = None) -> Conditioning:
        return self.cond[indices]

    def unconditional(self, n: int, sizes: Tensor | None = None) -> Conditioning:
        return self.uncond.expand(n)

    def captions(self, indices: Tensor, generator: torch.Generator | None = None) -> list[str]:
        return [self.texts[i] for i in indices.tolist()]
