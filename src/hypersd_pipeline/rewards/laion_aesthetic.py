"""LAION's aesthetic predictor: is the picture beautiful?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd_pipeline.config import Strict
from hypersd_pipeline.rewards.base import check_inputs
from hypersd_pipeline.rewards.open_clip_model import build_open_clip, check_open_clip, picture_side
from hypersd_pipeline.rewards.predictor import PredictorHead
from hypersd_pipeline.rewards.preprocess import crop_preprocess
from hypersd_pipeline.rewards.weights import Weights, find_weights, load_strictly, read_tensors


class LaionAestheticConfig(Strict):
    """Which files the predictor stands on.

    Attributes:
        head: ``sac+logos+ava1-l14-linearMSE.pth`` of github.com/christophschuhmann/improved-aesthetic-predictor; the hub's copy of it.
        clip: OpenAI's ViT-L/14 under open_clip's tensor names.
        clip_model: its architecture. OpenAI's weights were trained with QuickGELU; under the plain name they give other embeddings.
    """

    kind: Literal["laion_aesthetic"] = "laion_aesthetic"
    head: Weights = Weights(repo="trl-lib/ddpo-aesthetic-predictor", file="aesthetic-model.pth")
    clip: Weights = Weights(repo="timm/vit_large_patch14_clip_224.openai", file="open_clip_model.safetensors")
    clip_model: str = "ViT-L-14-quickgelu"

    def files(self) -> list[Path]:
        """Head and tower, found, fetched and checked. Raises UserError."""
        return [find_weights(self.head, "laion_aesthetic.head"), find_weights(self.clip, "laion_aesthetic.clip")]


class LaionAesthetic(nn.Module):
    """About 1 to 10, most pictures 4 to 7; prompts are ignored. The embedding is L2-normalised before the head."""

    name = "laion_aesthetic"

    def __init__(self, visual: Any, head: PredictorHead) -> None:
        super().__init__()
        self.visual, self.head = visual, head
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        check_inputs(images, prompts)
        embeddings = self.visual(crop_preprocess(images, picture_side(self.visual)))
        return self.head(F.normalize(embeddings, dim=-1))


def load_laion_aesthetic(config: LaionAestheticConfig, device: torch.device | str) -> LaionAesthetic:
    """The predictor, frozen.

    Raises:
        UserError: a file is missing, has another sha256, or holds another architecture.
    """
    width = check_open_clip(config.clip_model, "laion_aesthetic.clip_model")["embed_dim"]
    head_file, clip_file = config.files()
    head = PredictorHead(width)
    load_strictly(head, read_tensors(head_file), head_file)
    visual = build_open_clip(config.clip_model, clip_file, "laion_aesthetic.clip_model").visual  # the text tower is let go
    return LaionAesthetic(visual, head).to(device)
