"""HPSv2: which of two images of a prompt would people prefer?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hypersd_pipeline.conditioning import moved
from hypersd_pipeline.config import Strict
from hypersd_pipeline.rewards.base import check_images_and_prompts
from hypersd_pipeline.rewards.open_clip_model import build_open_clip, check_open_clip, image_side, open_clip_shapes
from hypersd_pipeline.rewards.preprocess import pad_preprocess
from hypersd_pipeline.rewards.weights import Weights, check_weights


class HpsV2Config(Strict):
    """Which file the score stands on.

    Attributes:
        weights: ``HPS_v2_compressed.pt`` (version 2.0) or ``HPS_v2.1_compressed.pt`` of the hub repository xswu/HPSv2.
        clip_model: their architecture.
    """

    kind: Literal["hps_v2"] = "hps_v2"
    weights: Weights = Weights(repo="xswu/HPSv2", file="HPS_v2.1_compressed.pt")
    clip_model: str = "ViT-H-14"

    def files(self) -> list[Path]:
        """The weights, found, fetched and checked. Raises UserError."""
        return [self.weights.find("hps_v2.weights")]

    def check(self) -> None:
        """Raises UserError for weights that are missing, damaged or of another network."""
        check_open_clip(self.clip_model, "hps_v2.clip_model")
        for path in self.files():
            check_weights(path, self.clip_model, lambda: open_clip_shapes(self.clip_model, "hps_v2.clip_model"))

    def load(self, device: torch.device | str) -> HpsV2:
        """The model, frozen.

        Raises:
            UserError: the file is missing, has another sha256, or holds another architecture.
        """
        check_open_clip(self.clip_model, "hps_v2.clip_model")
        (path,) = self.files()
        return HpsV2(build_open_clip(self.clip_model, path, "hps_v2.clip_model")).to(device)


class HpsV2(nn.Module):
    """A hundred times the cosine of image and prompt, as in the published tables: about 20 to 35 (their package's ``score`` returns the
    cosine itself).
    """

    name = "hps_v2"

    def __init__(self, clip: Any) -> None:
        super().__init__()
        import open_clip

        self.clip, self.tokenizer = clip, open_clip.SimpleTokenizer(context_length=clip.context_length)
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        check_images_and_prompts(images, prompts)
        image = self.clip.encode_image(pad_preprocess(images, image_side(self.clip.visual)), normalize=True)
        with torch.no_grad():
            text = self.clip.encode_text(moved(self.tokenizer(list(prompts)), images.device), normalize=True)
        return 100 * (image * text).sum(-1)
