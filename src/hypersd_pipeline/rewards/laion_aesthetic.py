"""LAION's aesthetic predictor: is the image beautiful?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd_pipeline.config import Strict
from hypersd_pipeline.models.tensors import shapes_of
from hypersd_pipeline.rewards.base import check_images_and_prompts
from hypersd_pipeline.rewards.open_clip_model import build_open_clip, check_open_clip, image_side, open_clip_shapes
from hypersd_pipeline.rewards.predictor import PredictorHead
from hypersd_pipeline.rewards.preprocess import crop_preprocess
from hypersd_pipeline.rewards.weights import Weights, check_weights, load_strictly, read_tensors


class LaionAestheticConfig(Strict):
    """Which files the predictor stands on.

    Attributes:
        head: ``sac+logos+ava1-l14-linearMSE.pth`` of github.com/christophschuhmann/improved-aesthetic-predictor. The hub's copy of it.
        clip: OpenAI's ViT-L/14 under open_clip's tensor names.
        clip_model: its architecture. OpenAI's weights were trained with QuickGELU. Under the plain name they give other embeddings.
    """

    kind: Literal["laion_aesthetic"] = "laion_aesthetic"
    head: Weights = Weights(repo="trl-lib/ddpo-aesthetic-predictor", file="aesthetic-model.pth")
    clip: Weights = Weights(repo="timm/vit_large_patch14_clip_224.openai", file="open_clip_model.safetensors")
    clip_model: str = "ViT-L-14-quickgelu"

    def files(self) -> list[Path]:
        """Head and tower, found, fetched and checked. Raises UserError."""
        return [self.head.find("laion_aesthetic.head"), self.clip.find("laion_aesthetic.clip")]

    def check(self) -> None:
        """Raises UserError for weights that are missing, damaged or of another network."""
        width = check_open_clip(self.clip_model, "laion_aesthetic.clip_model")["embed_dim"]
        head, clip = self.files()
        check_weights(head, width, lambda: shapes_of(lambda: PredictorHead(width)))
        check_weights(clip, self.clip_model, lambda: open_clip_shapes(self.clip_model, "laion_aesthetic.clip_model"))

    def load(self, device: torch.device | str) -> LaionAesthetic:
        """The predictor, frozen.

        Raises:
            UserError: a file is missing, has another sha256, or holds another architecture.
        """
        width = check_open_clip(self.clip_model, "laion_aesthetic.clip_model")["embed_dim"]
        head_file, clip_file = self.files()
        head = PredictorHead(width)
        load_strictly(head, read_tensors(head_file), head_file)
        visual = build_open_clip(self.clip_model, clip_file, "laion_aesthetic.clip_model").visual  # the text tower is let go
        return LaionAesthetic(visual, head).to(device)


class LaionAesthetic(nn.Module):
    """About 1 to 10, most images 4 to 7. Prompts are ignored. The embedding is L2-normalised before the head."""

    name = "laion_aesthetic"

    def __init__(self, visual: Any, head: PredictorHead) -> None:
        super().__init__()
        self.visual, self.head = visual, head
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        check_images_and_prompts(images, prompts)
        embeddings = self.visual(crop_preprocess(images, image_side(self.visual)))
        return self.head(F.normalize(embeddings, dim=-1))
