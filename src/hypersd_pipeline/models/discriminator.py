"""The discriminator: the teacher's encoder and mid block, and a small convolutional head with one logit (SDXL-Lightning, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hypersd_pipeline.conditioning import Conditioning

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def encode_to_mid(unet: UNet2DConditionModel, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """The UNet's forward pass up to the mid block, with whichever adapter is in use.

    Args:
        x_t: ``[b, c, h, w]`` in the UNet's dtype; ``t``: int64 ``[b]``.

    Returns:
        ``[b, C, h', w']``, the output of the mid block.
    """
    inputs = cond.unet_kwargs()
    text, added = inputs["encoder_hidden_states"], inputs.get("added_cond_kwargs", {})
    emb = unet.time_embedding(unet.get_time_embed(sample=x_t, timestep=t))
    extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
    emb = emb if extra is None else emb + extra
    x = unet.conv_in(x_t)
    for block in unet.down_blocks:
        crossed = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        x, _ = block(hidden_states=x, temb=emb, **crossed)
    return unet.mid_block(x, emb, encoder_hidden_states=text)


@contextmanager
def watched_mid(unet: UNet2DConditionModel) -> Iterator[list[Tensor]]:
    """The outputs of the mid block in the forward passes made inside, in order."""
    seen: list[Tensor] = []
    handle = unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


class Head(nn.Module):
    """Blocks of 4 x 4 convolution with stride 2, GroupNorm(32) and SiLU down to at most 2 x 2, then one logit, averaged over what is left.

    Args:
        channels: of the features, both points of the pair together. size: their height and width, at least 2.
        hidden: channels inside, a multiple of 32.
    """

    def __init__(self, channels: int, size: int, hidden: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while not layers or size > 2:
            layers += [nn.Conv2d(channels, hidden, 4, stride=2, padding=1), nn.GroupNorm(32, hidden), nn.SiLU()]
            channels, size = hidden, size // 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(hidden, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """``[b, channels, h, w]`` -> logits ``[b]``, float32; above zero is "real"."""
        with torch.autocast(features.device.type, enabled=False):
            return self.layers(features.float()).mean(dim=(1, 2, 3))


def make_head(unet: UNet2DConditionModel, hidden: int, points: int, seed: int) -> Head:
    """A head, initialised from the seed, for the mid features of ``points`` (1 or 2) noisy samples."""
    size = unet.config.sample_size // 2 ** (len(unet.config.block_out_channels) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Head(points * unet.config.block_out_channels[-1], size, hidden)
