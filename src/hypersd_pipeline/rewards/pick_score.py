"""PickScore: which of two images of a prompt would people pick?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd_pipeline.conditioning import moved
from hypersd_pipeline.config import Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.tensors import check_finite, check_report
from hypersd_pipeline.rewards.base import check_images_and_prompts
from hypersd_pipeline.rewards.preprocess import crop_preprocess
from hypersd_pipeline.rewards.weights import Weights
from hypersd_pipeline.verdicts import remembered


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
        return [self.weights.find("pick_score.weights", beside=("config.json",))]

    def check(self) -> None:
        """Raises UserError for weights that are missing, damaged or of another network."""
        (path,) = self.files()
        remembered("pick_score", [path, path.with_name("config.json")], None, lambda: _check(path))

    def load(self, device: torch.device | str) -> PickScore:
        """The model, frozen.

        Raises:
            UserError: a file is missing, has another sha256, or holds another architecture.
        """
        from transformers import CLIPModel

        (path,) = self.files()
        try:
            model, info = CLIPModel.from_pretrained(path.parent, use_safetensors=True, local_files_only=True, output_loading_info=True)
        except Exception as error:  # transformers raises whatever the files provoke
            raise UserError(
                f"{path}: transformers cannot load it as a CLIP model ({type(error).__name__}); fetch the folder again."
            ) from error
        if missing := sorted(info["missing_keys"]):
            raise UserError(f"{path}: lacks {missing[0]} (of {len(missing)} tensors); give PickScore's own file.")
        return PickScore(model).to(device)


def _check(path: Path) -> bool:
    from transformers import CLIPModel, logging

    logging.disable_progress_bar()
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        _, report = CLIPModel.from_pretrained(path.parent, **options, device_map="meta")
    except Exception as error:  # transformers raises whatever the files provoke
        raise UserError(f"{path}: transformers cannot load it as a CLIP model ({type(error).__name__}); fetch the folder again.") from error
    check_report(path, report, "give PickScore's own file")
    check_finite(path)
    return True


class PickScore(nn.Module):
    """``exp(logit_scale) cos(image, prompt)``: about 16 to 26. The scale is 100. Published tables show a hundredth, 0.16 to 0.26."""

    name = "pick_score"

    def __init__(self, clip: Any) -> None:
        super().__init__()
        import open_clip

        self.clip = clip
        # CLIP's one vocabulary. It pads with another token than transformers' does. Nothing that counts attends to padding.
        self.tokenizer = open_clip.SimpleTokenizer(context_length=clip.config.text_config.max_position_embeddings)
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        check_images_and_prompts(images, prompts)
        pixels = crop_preprocess(images, self.clip.config.vision_config.image_size)
        image = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        with torch.no_grad():
            tokens = moved(self.tokenizer(list(prompts)), images.device)
            text = self.clip.text_projection(self.clip.text_model(input_ids=tokens).pooler_output)
        return self.clip.logit_scale.exp() * F.cosine_similarity(image, text, dim=-1)
