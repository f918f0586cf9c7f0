"""ImageReward v1.0 (arXiv 2304.05977): BLIP with a linear head, on transformers' BLIP modules.

Architecture and names are the published ones (github.com/THUDM/ImageReward): BLIP's ViT-L/16 at 224 pixels, a BERT-base whose layers attend
to the image, and the head on the first token's last state. That token is BERT's ``[CLS]``: unlike BLIP's own matching head, ImageReward
leaves it in place and does not write BLIP's ``[ENC]`` over it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hypersd_pipeline.conditioning import moved
from hypersd_pipeline.config import Side, Strict, Width
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.dual_encoder import minilm_folder
from hypersd_pipeline.models.tensors import shapes_of
from hypersd_pipeline.rewards.base import check_images_and_prompts
from hypersd_pipeline.rewards.predictor import PredictorHead
from hypersd_pipeline.rewards.preprocess import crop_preprocess
from hypersd_pipeline.rewards.weights import Weights, check_weights, load_strictly, read_tensors

MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35

_BLOCK = r"blip\.visual_encoder\.blocks\.(\d+)\."
_RENAMED = (
    (r"blip\.visual_encoder\.cls_token", r"vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", r"vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(weight|bias)", r"vision.embeddings.patch_embedding.\1"),
    (_BLOCK + r"norm([12])\.(weight|bias)", r"vision.encoder.layers.\1.layer_norm\2.\3"),
    (_BLOCK + r"attn\.qkv\.(weight|bias)", r"vision.encoder.layers.\1.self_attn.qkv.\2"),
    (_BLOCK + r"attn\.proj\.(weight|bias)", r"vision.encoder.layers.\1.self_attn.projection.\2"),
    (_BLOCK + r"mlp\.fc([12])\.(weight|bias)", r"vision.encoder.layers.\1.mlp.fc\2.\3"),
    (r"blip\.visual_encoder\.norm\.(weight|bias)", r"vision.post_layernorm.\1"),
    (r"blip\.text_encoder\.embeddings\.(word_embeddings|position_embeddings)\.weight", r"text.embeddings.\1.weight"),
    (r"blip\.text_encoder\.embeddings\.LayerNorm\.(weight|bias)", r"text.embeddings.LayerNorm.\1"),
    (
        r"blip\.text_encoder\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.(query|key|value)\.(weight|bias)",
        r"text.encoder.layer.\1.\2.self.\3.\4",
    ),
    (
        r"blip\.text_encoder\.encoder\.layer\.(\d+)\.(attention|crossattention)\.output\.(dense|LayerNorm)\.(weight|bias)",
        r"text.encoder.layer.\1.\2.output.\3.\4",
    ),
    (r"blip\.text_encoder\.encoder\.layer\.(\d+)\.intermediate\.dense\.(weight|bias)", r"text.encoder.layer.\1.intermediate.dense.\2"),
    (r"blip\.text_encoder\.encoder\.layer\.(\d+)\.output\.(dense|LayerNorm)\.(weight|bias)", r"text.encoder.layer.\1.output.\2.\3"),
    (r"mlp\.layers\.(0|2|4|6|7)\.(weight|bias)", r"mlp.layers.\1.\2"),
)
IGNORED = (
    "blip.text_encoder.embeddings.position_ids",  # 0, 1, 2, ...
    "blip.vision_proj.weight", "blip.vision_proj.bias", "blip.text_proj.weight", "blip.text_proj.bias",  # of BLIP's contrastive loss
)  # fmt: skip
"""Published tensors that the score does not use."""


class BlipShape(Strict):
    """Sizes of the network. The defaults are ImageReward v1.0's (its ``med_config.json``, and BLIP's ``vit: large``)."""

    image_size: Side = 224
    patch_size: Width = 16
    vision_width: Width = 1024
    vision_layers: Width = 24
    vision_heads: Width = 16
    text_width: Width = 768
    text_layers: Width = 12
    text_heads: Width = 12
    text_hidden: Width = 3072
    vocabulary: int = Field(default=30524, ge=30522, le=10**6)
    max_positions: int = Field(default=512, ge=MAX_TOKENS, le=2**16)


class ImageRewardConfig(Strict):
    """Which file the score stands on.

    Attributes:
        weights: ``ImageReward.pt`` of the hub repository THUDM/ImageReward.
        shape: of the network in the file.
    """

    kind: Literal["image_reward"] = "image_reward"
    weights: Weights = Weights(repo="THUDM/ImageReward", file="ImageReward.pt")
    shape: BlipShape = BlipShape()

    def files(self) -> list[Path]:
        """The weights, found, fetched and checked. Raises UserError."""
        return [self.weights.find("image_reward.weights")]

    def check(self) -> None:
        """Raises UserError for weights that are missing, damaged or of another network."""
        for path in self.files():
            check_weights(
                path,
                self.shape.model_dump(),
                lambda: shapes_of(lambda: ImageReward(self.shape)),
                lambda tensors, path=path: from_published(tensors, path),  # type: ignore[misc]
            )

    def load(self, device: torch.device | str) -> ImageReward:
        """The model, frozen. Every published tensor is accounted for.

        Raises:
            UserError: the file is missing, has another sha256, or holds another architecture.
        """
        (path,) = self.files()
        tensors = from_published(read_tensors(path), path)
        model = ImageReward(self.shape)
        load_strictly(model, tensors, path)
        return model.to(device)


class ImageReward(nn.Module):
    """About -2.3 to 2: standardised, so that 0 is the mean and 1 the deviation of the images it was calibrated on."""

    name = "image_reward"

    def __init__(self, shape: BlipShape) -> None:
        super().__init__()
        from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.image_size = shape.image_size
        vision = BlipVisionConfig(
            hidden_size=shape.vision_width, intermediate_size=4 * shape.vision_width, num_hidden_layers=shape.vision_layers,
            num_attention_heads=shape.vision_heads, image_size=shape.image_size, patch_size=shape.patch_size, layer_norm_eps=1e-6,
        )  # fmt: skip
        text = BlipTextConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.text_width, encoder_hidden_size=shape.vision_width,
            intermediate_size=shape.text_hidden, num_hidden_layers=shape.text_layers, num_attention_heads=shape.text_heads,
            max_position_embeddings=shape.max_positions, layer_norm_eps=1e-12,
        )  # fmt: skip
        self.vision: Any = BlipVisionModel(vision)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = PredictorHead(shape.text_width)
        self.tokenizer = BertTokenizer.from_pretrained(str(minilm_folder()))  # its vocabulary is bert-base-uncased's, byte for byte
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`. Prompts are cut to 35 tokens."""
        check_images_and_prompts(images, prompts)
        options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options)
        ids, mask = (moved(part, images.device) for part in (tokens.input_ids, tokens.attention_mask))
        image = self.vision(pixel_values=crop_preprocess(images, self.image_size)).last_hidden_state
        states = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        return (self.mlp(states[:, 0]) - MEAN) / STD


def from_published(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Published names to ours. `IGNORED` ones are left out.

    Raises:
        UserError: a name that is neither mapped nor ignored.
    """
    ours, unknown = {}, []
    for name, tensor in tensors.items():
        target = next((re.sub(pattern, new, name) for pattern, new in _RENAMED if re.fullmatch(pattern, name)), None)
        if target is not None:
            ours[target] = tensor
        elif name not in IGNORED:
            unknown.append(name)
    if unknown:
        raise UserError(f"{path}: {unknown[0]} (of {len(unknown)}) is no tensor of ImageReward v1.0; give its published ImageReward.pt.")
    return ours
