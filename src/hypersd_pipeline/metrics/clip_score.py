"""CLIP score: does the picture show what its caption says?"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.metrics.config import ClipConfig
from hypersd_pipeline.models.dual_encoder import load_dual_encoder


class ImageTextEncoder(Protocol):
    """Images ``[b, 3, h, w]`` in [0, 1] and captions to unit vectors ``[b, d]`` in one space."""

    name: str

    def encode_images(self, images: Tensor) -> Tensor: ...

    def encode_texts(self, texts: list[str]) -> Tensor: ...


class OpenClipEncoder:
    """Any model of ``open_clip``, with its own size, mean and deviation (bicubic resize of the shorter side, centre crop).

    Raises:
        UserError: open_clip knows no such model or weights, or cannot get them.
    """

    def __init__(self, model: str, pretrained: str, device: torch.device | str = "cpu") -> None:
        import open_clip

        self.name = model
        try:
            self.model = open_clip.create_model(model, pretrained=pretrained, device=device).eval().requires_grad_(False)
            self.tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:  # open_clip raises RuntimeError, hubs raise their own
            raise UserError(
                f"evaluation.clip: open_clip cannot load {model!r} with weights {pretrained!r} ({error}); see open_clip.list_pretrained()."
            ) from error
        self.device = torch.device(device)

    def encode_images(self, images: Tensor) -> Tensor:
        visual = self.model.visual
        size = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else visual.image_size
        height, width = images.shape[-2:]
        shape = [max(size, round(side * size / min(height, width))) for side in (height, width)]
        images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"]))
        images = (images[..., top : top + size, left : left + size].clamp(0, 1) - mean) / std
        return self.model.encode_image(images, normalize=True)

    def encode_texts(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)


def load_clip(config: ClipConfig, device: torch.device | str = "cpu") -> ImageTextEncoder:
    """The encoder that the configuration names.

    Raises:
        UserError: an open_clip name without weights.
    """
    if config.model == "shipped":
        return load_dual_encoder().to(device)
    if config.pretrained is None:
        raise UserError(f"evaluation.clip.pretrained: {config.model} needs weights, an open_clip tag such as 'openai' or a local file.")
    return OpenClipEncoder(config.model, config.pretrained, device)


def clip_scores(image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """``100 max(cos, 0)`` per pair of unit vectors ``[n, d]``: ``[n]`` (CLIPScore, Hessel et al. 2021, in the paper's scale)."""
    return 100 * (image_embeddings * text_embeddings).sum(-1).clamp(min=0)
