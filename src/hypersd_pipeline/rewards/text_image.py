"""Our own text-image reward: a small head on the packaged dual encoder, trained by eq. 9 on preference pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd_pipeline.config import Strict, Width
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import tensors_sha256, write_tensors
from hypersd_pipeline.models.dual_encoder import (
    IMAGE_WIDTH,
    TEXT_WIDTH,
    DualEncoder,
    check_head,
    described,
    dual_encoder_key,
    load_dual_encoder,
    read_checked,
)
from hypersd_pipeline.rewards.base import check_images_and_prompts, straight_through_clamp

Role = Literal["trained", "held_out"]
FILE = "reward.safetensors"


class TextImageHeadConfig(Strict):
    """Shape of the head.

    Attributes:
        inputs: ``embeddings``: the dual encoder's unit vectors. ``features``: the towers' own features, with projections of the head's own.
        embed_dim: width of the space where image and prompt are compared. With ``embeddings`` it must be the encoder's.
        hidden: width of the two hidden layers. activation: between them.
    """

    inputs: Literal["embeddings", "features"] = "embeddings"
    embed_dim: Width = 256
    hidden: Width = 128
    activation: Literal["gelu", "silu"] = "gelu"


class TextImageHead(nn.Module):
    """Image and prompt vectors to scores: an MLP on both unit vectors and their product.

    With ``inputs: features`` both are standardised and projected first. The output is standardised after training (`standardise_`).
    """

    def __init__(self, config: TextImageHeadConfig) -> None:
        super().__init__()
        self.config = config
        d, activation = config.embed_dim, {"gelu": nn.GELU, "silu": nn.SiLU}[config.activation]
        self.image = nn.Linear(IMAGE_WIDTH, d) if config.inputs == "features" else nn.Identity()
        self.text = nn.Linear(TEXT_WIDTH, d) if config.inputs == "features" else nn.Identity()
        self.layers = nn.Sequential(
            nn.Linear(3 * d, config.hidden),
            activation(),
            nn.Linear(config.hidden, config.hidden),
            activation(),
            nn.Linear(config.hidden, 1),
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """``[b, 256]`` and ``[b, 256]`` unit vectors, or ``[b, 1280]`` and ``[b, 384]`` features -> ``[b]``."""
        scale = self.config.embed_dim**0.5  # entries of about one, which the default initialisation expects
        u, v = F.normalize(self.image(image), dim=-1) * scale, F.normalize(self.text(text), dim=-1) * scale
        return self.layers(torch.cat([u * v, u, v], dim=-1)).squeeze(-1)

    def whiten_(self, image: Tensor, text: Tensor) -> None:
        """Start the projections of ``features`` on standardised inputs: orthogonal, with mean and deviation of ``[n, d]`` folded in."""
        for layer, x in ((self.image, image), (self.text, text)):
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                layer.weight.data.div_(x.std(0) + 0.1 * x.std())
                layer.bias.data.copy_(-layer.weight.data @ x.mean(0))

    def standardise_(self, mean: float, deviation: float) -> None:
        """Fold ``(score - mean) / deviation`` into the last layer. Ranks do not change."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        last.weight.data.div_(deviation)
        last.bias.data.sub_(mean).div_(deviation)


def head_inputs(encoder: DualEncoder, config: TextImageHeadConfig, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """What the head takes, from the towers' features ``[n, 1280]`` and ``[m, 384]``."""
    if config.inputs == "features":
        return image, text
    return encoder.project_images(image), encoder.project_texts(text)


class TextImageConfig(Strict):
    """Which trained head: a file that ``kedro run --pipelines reward_models`` writes."""

    kind: Literal["text_image"] = "text_image"
    weights: Path = Path("data/06_models/text_image_reward") / FILE

    def files(self) -> list[Path]:
        """The trained head. Raises UserError where it is missing."""
        path = self.weights.expanduser()
        if not path.is_file():
            raise UserError(
                f"text_image.weights: {path} does not exist; run 'kedro run --pipelines reward_models', or name another file there."
            )
        return [path]

    def check(self) -> None:
        """Raises UserError for a head that is missing, damaged, no text-image reward, or of another dual encoder."""
        for path in self.files():
            self.role_of(check_head(path, dual_encoder_key(), TextImageHeadConfig, TextImageHead))

    def role_of(self, metadata: Mapping[str, str]) -> Role:
        """What the head is for. Raises UserError where its metadata does not say."""
        role = metadata.get("role")
        if role not in ("trained", "held_out"):
            raise UserError(f"{self.weights}: is no text-image reward; train one with 'kedro run --pipelines reward_models'.")
        return "held_out" if role == "held_out" else "trained"

    def role(self) -> Role:
        """As `role_of`, of the file."""
        return self.role_of(read_checked(self.files()[0])[1])

    def load(self, device: torch.device | str) -> TextImageReward:
        """A trained head on the packaged dual encoder, frozen.

        Raises:
            UserError: the file is missing or damaged, is no text-image reward, or was trained on another dual encoder.
        """
        (path,) = self.files()
        tensors, metadata = read_checked(path)
        role = self.role_of(metadata)
        encoder = load_dual_encoder()
        if metadata.get("dual_encoder") != tensors_sha256(encoder.trained_tensors()):
            raise UserError(f"{path}: was trained on another dual encoder; train it again with 'kedro run --pipelines reward_models'.")
        head = TextImageHead(described(path, metadata, "config", TextImageHeadConfig))
        head.load_state_dict(tensors)
        return TextImageReward(encoder, head, role).to(device)


class TextImageReward(nn.Module):
    """Mean 0 and deviation 1 on winners that it was not trained on (clean images with their own captions). Broken images and wrong
    captions lie below, to about -5. Images of the split ``train`` score higher, by about 0.7.

    Attributes:
        role: ``trained``, or ``held_out`` for the one that is reported and never trained on.
    """

    name = "text_image"

    def __init__(self, encoder: DualEncoder, head: TextImageHead, role: Role) -> None:
        super().__init__()
        self.encoder, self.head, self.role = encoder, head, role
        self.eval().requires_grad_(False)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `Reward.score`."""
        check_images_and_prompts(images, prompts)
        features = self.encoder.image_features(straight_through_clamp(images))
        with torch.no_grad():
            text = self.encoder.text_features(list(prompts))
        return self.head(*head_inputs(self.encoder, self.head.config, features, text))


def save_text_image(head: TextImageHead, encoder: DualEncoder, role: Role, path: Path, recipe: dict[str, Any]) -> None:
    """Write the head with its shape, its role, the hash of the dual encoder it stands on, its own hash and the recipe."""
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in head.state_dict().items()}
    metadata = {
        "config": head.config.model_dump_json(),
        "role": role,
        "dual_encoder": tensors_sha256(encoder.trained_tensors()),
        "sha256": tensors_sha256(tensors),
    }
    write_tensors(path, tensors, {**metadata, "recipe": json.dumps(recipe, sort_keys=True)})
