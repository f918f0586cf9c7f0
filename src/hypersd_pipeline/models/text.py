"""Text conditioning as diffusers' own pipelines compute it, for the SD1.5 and the SDXL layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def max_tokens(tokenizer: Any, encoder: Any) -> int:
    """Longest token row that both the tokenizer and the encoder's position table allow (77 for CLIP)."""
    return min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Token ids, padded and cut to ``length``: int64 ``[b, length]``."""
    return tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def count_truncated(tokenizer: Any, prompts: Sequence[str], length: int) -> int:
    """How many prompts lose tokens at ``length`` (start and end marks included)."""
    if not prompts:
        return 0
    return sum(len(ids) > length for ids in tokenizer(list(prompts)).input_ids)


def encode_sd15(tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> Tensor:
    """Last hidden state of ``CLIPTextModel``, after its final norm: ``[b, L, D]`` in the encoder's dtype."""
    inputs = tokenizer(list(prompts), padding="max_length", max_length=max_tokens(tokenizer, encoder), truncation=True, return_tensors="pt")
    mask = inputs.attention_mask.to(encoder.device) if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(inputs.input_ids.to(encoder.device), attention_mask=mask)[0]


def encode_sdxl(tokenizers: Sequence[Any], encoders: Sequence[Any], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Penultimate hidden states of both encoders side by side, and the second one's projected embedding.

    Returns:
        ``(prompt_embeds [b, L, D1 + D2], pooled [b, P])`` in the second encoder's dtype.
    """
    hidden = []
    pooled = None
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        ids = tokenize(tokenizer, prompts, max_tokens(tokenizer, encoder))
        output = encoder(ids.to(encoder.device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
        pooled = output[0]  # CLIPTextModelWithProjection puts text_embeds first
    assert pooled is not None and pooled.ndim == 2
    return torch.cat(hidden, dim=-1).to(pooled.dtype), pooled
