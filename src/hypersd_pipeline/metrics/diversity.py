"""How much images of the same prompt differ from each other."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_distance(features: Tensor) -> Tensor:
    """Mean cosine distance between the images of each prompt, in [0, 2]; 0 where a model draws one image whatever the noise.

    Args:
        features: ``[prompts, variants, d]``, at least two variants.

    Returns:
        ``[prompts]``.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    n = unit.shape[1]
    similarity = unit @ unit.transpose(1, 2)
    return 1 - (similarity.sum(dim=(1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(-1)) / (n * (n - 1))
