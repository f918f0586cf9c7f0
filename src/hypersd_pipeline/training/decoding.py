"""Decoding with little memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def decoded_one_by_one(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
    """Images whose decoding is computed again in the backward pass, one by one: then the decoder's activations are held for one only.

    At 1024 pixels they take some 20 GB an image in float32, by count. Around a whole batch, checkpointing would hold all of them at once.
    """
    return torch.cat([checkpoint(decode, one, use_reentrant=False) for one in latents.split(1)])
