"""A network together with the process that it was trained for: the only form in which objectives and sampling see networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.guidance import guide
from hypersd_pipeline.diffusion.process import Process

Network = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""``(x_t [b, c, h, w], t int64 [b], cond) -> raw network output [b, c, h, w]``."""


@dataclass(frozen=True)
class Denoiser:
    """Attributes: ``network``, and the ``process`` that gives its output a meaning."""

    network: Network
    process: Process

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """``(x0, eps)`` that the network sees in ``x_t`` ``[b, c, h, w]`` at ``t`` int64 ``[b]``. Both at least float32."""
        return self.process.to_x0_eps(self.network(x_t, t, cond), x_t, t)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Conditioning) -> Tensor:
        """``Psi(x0, eps, s)`` of the prediction at ``(x_t, t)``: one DDIM step to ``s`` int64 ``[b]``. At least float32."""
        x0, eps = self.predict(x_t, t, cond)
        return self.process.ddim(x0, eps, s)

    def clean(self, x_t: Tensor, t: int, cond: Conditioning) -> Tensor:
        """``x0``, where all samples of the batch are at the same timestep."""
        return self.predict(x_t, torch.full((len(x_t),), t, device=x_t.device), cond)[0]

    def in_bf16(self, wanted: bool = True) -> Denoiser:
        """The same, with the network in bf16 by autocast. Unchanged where that is not ``wanted``."""
        if not wanted:
            return self
        network = self.network

        def call(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            with torch.autocast(x_t.device.type, torch.bfloat16):
                return network(x_t, t, cond)

        return Denoiser(call, self.process)

    def guided(self, uncond: Conditioning, scale: Tensor | float) -> Denoiser:
        """The same with classifier-free guidance: one call of the network on the batch of both halves.

        Args:
            uncond: of one sample, or of as many as ``x_t`` has.
            scale: a number, or ``[b, 1, 1, 1]``.
        """
        network = self.network

        def call(x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            without = uncond.expand(len(x_t)) if len(uncond) == 1 else uncond
            output_u, output_c = network(torch.cat([x_t, x_t]), torch.cat([t, t]), Conditioning.cat(without, cond)).chunk(2)
            return guide(output_u, output_c, scale)

        return Denoiser(call, self.process)
