"""PickScore: which of two pictures of a prompt would people pick?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd_pipeline.config import Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.rewards.base import check_inputs
from hypersd_pipeline.rewards.preprocess import crop_preprocess
from hypersd_pipeline.rewards.weights import Weights, find_weights


class PickScoreConfig(Strict):
    """Which file the score stands on.

    Attributes:
        weights: ``model.safetensors`` of a transformers CLIP model, with its ``config.json`` beside it.
    """

    kind: Literal["pick_score"] = "pick_score"
    weights: Weights = Weights(repo="yuvalkirstain/PickScore_v1", file="model.safetensors")

    def files(self) -> list[Path]:
        """The weights and what lies beside them, found, fetched and checked. Raises UserError."""
        if Path(self.weights.path or self.weights.file or "").name != "model.safetensors":
            raise UserError("pick_score.weights: the file must be a model.safetensors, with its config.json beside it.")
        return [find_weights(self.weights, "pick_score.weights", beside=("config.json",))]


class PickScore(nn.Module):
    """``exp(logit_scale) cos(picture, prompt)``: about 16 to 26. The scale is 100; published tables show a hundredth, 0.16 to 0.26."""

    name = "pick_score"

    def __init__(self, clip: Any) -> None:
        super().__init__()
        import open_clip

        self.clip = clip
        # CLIP's one vocabulary. It pads with another token than transformers' does; nothing that counts attends to padding.
        self.tokenizer = open_clip.SimpleTokenizer(context_length=clip.config.text_config.max_position_embeddings)
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        check_inputs(images, prompts)
        pixels = crop_preprocess(images, self.clip.config.vision_config.image_size)
        picture = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        with torch.no_grad():
            tokens = self.tokenizer(list(prompts)).to(images.device)
            text = self.clip.text_projection(self.clip.text_model(input_ids=tokens).pooler_output)
        return self.clip.logit_scale.exp() * F.cosine_similarity(picture, text, dim=-1)


def load_pick_score(config: PickScoreConfig, device: torch.device | str) -> PickScore:
    """The model, frozen.

    Raises:
        UserError: a file is missing, has another sha256, or holds another architecture.
    """
    from transformers import CLIPModel

    (path,) = config.files()
    try:
        model, info = CLIPModel.from_pretrained(path.parent, use_safetensors=True, local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers raises whatever the files provoke
        raise UserError(f"{path}: transformers cannot load it as a CLIP model ({type(error).__name__}); fetch the folder again.") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{path}: lacks {missing[0]} (of {len(missing)} tensors); give PickScore's own file.")
    return PickScore(model).to(device)
