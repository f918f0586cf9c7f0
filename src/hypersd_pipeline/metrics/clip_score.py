"""CLIP score: does the image show what its caption says?"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd_pipeline.config import Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.dual_encoder import dual_encoder_key, load_dual_encoder
from hypersd_pipeline.models.tensors import check_finite
from hypersd_pipeline.verdicts import remembered


class ClipConfig(Strict):
    """The image-text encoder of the CLIP score.

    Attributes:
        model: ``shipped`` (the packaged dual encoder; its scores do not compare to CLIP's) or an open_clip name, for instance ``ViT-B-32``.
        pretrained: an open_clip tag, for instance ``openai``, or a local weights file. Only with an open_clip name.
    """

    model: str = "shipped"
    pretrained: str | None = None

    def check(self) -> None:
        """Raises UserError for a model or weights that there are not, and for weights that are damaged."""
        check_clip(self)


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
            created = open_clip.create_model(model, pretrained=pretrained, device=device, weights_only=True)  # no pickled code
            self.model = created.eval().requires_grad_(False)
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


def check_clip(config: ClipConfig) -> None:
    """Raises UserError for an encoder that `load_clip` could not load, or whose values are NaN. One that was good is not read again."""
    if config.model == "shipped":
        dual_encoder_key()
        return
    path = _clip_file(config)

    def check() -> bool:
        model = load_clip(config, "cpu")
        check_finite(path, model.model.state_dict().items())  # type: ignore[attr-defined]
        return True

    remembered("clip", [path], config.model_dump(), check)


def _clip_file(config: ClipConfig) -> Path:
    """The weights of an open_clip name, a local file or one that is downloaded first. Raises UserError where there is none."""
    import open_clip

    name, weights = config.model, config.pretrained
    if name not in open_clip.list_models():
        close = get_close_matches(name, open_clip.list_models(), n=1)
        raise UserError(
            f"evaluation.clip.model: open_clip has no {name!r}; {f'did you mean {close[0]!r}?' if close else 'use one of its names.'}"
        )
    if weights is None:
        raise UserError(f"evaluation.clip.pretrained: {name} needs weights, an open_clip tag such as 'openai' or a local file.")
    if Path(weights).expanduser().is_file():
        return Path(weights).expanduser()
    published = open_clip.get_pretrained_cfg(name, weights)
    if not published:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"evaluation.clip.pretrained: {weights!r} is no file and no tag of {name}; give a file, or one of its tags ({tags})."
        )
    try:
        return Path(open_clip.download_pretrained(published))
    except Exception as error:  # hubs and urllib have a class for each way of not answering
        raise UserError(
            f"evaluation.clip: the weights {weights!r} of {name} cannot be fetched ({type(error).__name__}); check the network, or give a "
            "local file in evaluation.clip.pretrained."
        ) from error


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
