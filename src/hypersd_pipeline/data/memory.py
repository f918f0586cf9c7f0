"""Rows in memory, for a handful of prompts: what a stage trains on where there is no cache on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.sampling import sample_ddim
from hypersd_pipeline.models.teacher import Teacher


@dataclass(frozen=True)
class MemoryRows:
    """The methods of a `data.cache.SplitCache`, on tensors that are held. Each row has one caption and one draw of its latents.

    Attributes:
        latents: clean, ``[n, c, h, w]``. cond: of ``n`` prompts. uncond: of one sample. prompts: ``n``.
    """

    latents: Tensor
    cond: Conditioning
    uncond: Conditioning
    prompts: Sequence[str]

    @classmethod
    def drawn_by(
        cls, teacher: Teacher, prompts: Sequence[str], *, steps: int = 8, guidance_scale: float = 3.0, seed: int = 0
    ) -> MemoryRows:
        """Prompts with latents that the teacher samples for them, in place of images. Its parts ``backbone`` and ``text`` are needed."""
        cond, uncond = teacher.encode_prompts(prompts), teacher.unconditional()
        noise = torch.randn(len(prompts), *teacher.latent_shape, generator=torch.Generator().manual_seed(seed)).to(teacher.device)
        denoiser = teacher.denoiser().guided(uncond, guidance_scale)
        latents = sample_ddim(denoiser, noise, cond, teacher.process.trailing_timesteps(steps))
        return cls(latents.float().cpu(), cond.to("cpu", torch.float32), uncond.to("cpu", torch.float32), tuple(prompts))

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(c, h, w)``."""
        _, c, h, w = self.latents.shape
        return c, h, w

    @property
    def bucket_shapes(self) -> list[tuple[int, int, int]]:
        """None: all rows have one shape."""
        return []

    def sample(self, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        """The rows' latents."""
        return self.latents[indices]

    def conditioning(self, indices: Tensor, generator: torch.Generator | None = None) -> Conditioning:
        """Of the rows' prompts."""
        return self.cond[indices]

    def captions(self, indices: Tensor, generator: torch.Generator | None = None) -> list[str]:
        """The rows' prompts."""
        return [self.prompts[i] for i in indices.tolist()]

    def unconditional(self, n: int, sizes: Tensor | None = None) -> Conditioning:
        """The unconditional half of guidance, ``n`` times, without copying, with the ``sizes`` of the conditional half."""
        cond = self.uncond.expand(n)
        return cond if cond.sizes is None or sizes is None else Conditioning(cond.prompt_embeds, cond.pooled, sizes)
