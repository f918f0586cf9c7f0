"""Image features for the Frechet distance."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hypersd_pipeline.config import Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import address_file, check_sha256
from hypersd_pipeline.models.dual_encoder import efficientnet_weights, imagenet_normalise, load_efficientnet_, resize_images
from hypersd_pipeline.models.tensors import check_finite
from hypersd_pipeline.verdicts import remembered


class FeatureConfig(Strict):
    """Features for the Frechet distance.

    Attributes:
        kind: ``efficientnet_lite0`` (packaged, the metric is ``fd_efficientnet_lite0``) or ``inception`` (the metric is ``fid_inception``).
        resolution: images are resized to this square for EfficientNet. The embedded data's own 64 pixels cost 3.6 ms an image, 224
            twelve times more.
            Distances at different resolutions do not compare. Inception always resizes to 299, as the FID does.
        weights: a local ``pt_inception-2015-12-05-6726825d.pth``. Without it that file is downloaded once.
        sha256: of another file of the same network, or its first digits, eight at least. The published one's are known.
    """

    kind: Literal["efficientnet_lite0", "inception"] = "efficientnet_lite0"
    resolution: int = Field(default=64, ge=32, le=2048)
    weights: Path | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{8,64}$")

    def check(self) -> None:
        """Raises UserError for weights that are missing or damaged."""
        check_features(self)


INCEPTION_ADDRESS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"
"""The first digits of the file's sha256, which its publisher wrote into its name."""


class FeatureExtractor(Protocol):
    """``images [b, 3, h, w]`` float in [0, 1] -> features ``[b, d]`` float32.

    Attributes:
        name: the metric's name says it: ``fd_<name>``, or ``fid_inception``, the only one that is the FID.
        side: pixels of the square to which it resizes images.
    """

    name: str
    side: int

    def __call__(self, images: Tensor) -> Tensor: ...


class EfficientNetLite0:
    """Pooled 1280-d features of the packaged ImageNet EfficientNet-Lite0, on images resized to ``resolution``."""

    name = "efficientnet_lite0"

    def __init__(self, resolution: int = 64, device: torch.device | str = "cpu", trunk: nn.Module | None = None) -> None:
        import timm

        if trunk is None:
            trunk = load_efficientnet_(timm.create_model("tf_efficientnet_lite0", num_classes=0)).eval().requires_grad_(False)
        self.trunk, self.side = trunk.to(device), resolution

    def __call__(self, images: Tensor) -> Tensor:
        return self.trunk(imagenet_normalise(resize_images(images, self.side)))


class Inception:
    """The FID's Inception-v3 (2048-d, TensorFlow weights) through torch-fidelity, on images rounded to 8 bits as the FID does.

    Larger images are made smaller with an antialiased bicubic filter, as clean-fid does (Parmar et al. 2022). The network's own resize,
    which enlarges smaller ones, would leave out most of their pixels.

    Args:
        weights: see `inception_file`. device: where it runs.

    Raises:
        UserError: the file holds anything but the tensors of that network.
    """

    name = "inception"
    side = 299

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity unpickles freely, so it is handed our own pickle of what was read as tensors only
        ours = io.BytesIO()
        torch.save(_tensors_only(weights), ours)
        ours.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], ours).to(device)
        except RuntimeError as error:
            raise UserError(f"{weights}: these are not the FID's Inception-v3 weights; use {INCEPTION_ADDRESS}.") from error

    def __call__(self, images: Tensor) -> Tensor:
        if max(images.shape[-2:]) > self.side:
            images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        return self.network((images.clamp(0, 1) * 255).round().to(torch.uint8))[0]


def _tensors_only(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; download {INCEPTION_ADDRESS} there.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any unpickling failure
        raise UserError(f"{path}: not a file of tensors only ({type(error).__name__}); use {INCEPTION_ADDRESS}.") from error
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no table of tensors; use {INCEPTION_ADDRESS}.")
    return content


def inception_file(config: FeatureConfig) -> Path:
    """The weights of Inception-v3, checked: the local file, or torch-fidelity's own, which is downloaded once.

    Raises:
        UserError: it is missing, cannot be fetched, or is another file.
    """
    key, digits = "evaluation.features", config.sha256 or INCEPTION_SHA256
    if config.weights is None:
        path = address_file(INCEPTION_ADDRESS, digits, f"{key}.weights")
    else:
        path = config.weights.expanduser()
        if not path.is_file():
            raise UserError(f"{key}.weights: {path} does not exist; download {INCEPTION_ADDRESS} there, or use kind: efficientnet_lite0.")
    check_sha256(path, digits, key)
    return path


def check_features(config: FeatureConfig) -> None:
    """Raises UserError for weights that are missing or damaged; a file that was good is not read again."""
    if config.kind != "inception":
        efficientnet_weights()
        return
    path = inception_file(config)

    def check() -> bool:
        check_finite(path, Inception(path).network.state_dict().items())
        return True

    remembered("inception", [path], config.sha256, check)


def load_features(config: FeatureConfig, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor that the configuration names."""
    if config.kind == "inception":
        return Inception(inception_file(config), device)
    return EfficientNetLite0(config.resolution, device)


def crop_side(features: FeatureExtractor, image: int) -> int:
    """The side of the crops of images with ``image`` pixels a side, for the distance on crops.

    It is the side that the network sees, so that a crop keeps the image's own pixels (299 for the FID, as SDXL-Lightning, arXiv
    2402.13929, section 4). Images that are no larger than that give half of their side, which is then enlarged.
    """
    return features.side if features.side < image else image // 2


def centre_crop(images: Tensor, side: int) -> Tensor:
    """The middle ``[b, 3, side, side]`` of ``[b, 3, h, w]``."""
    top, left = ((size - side) // 2 for size in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def metric_name(extractor_name: str) -> str:
    """``fid_inception`` for Inception-v3 and for nothing else. ``fd_<features>`` otherwise."""
    return "fid_inception" if extractor_name == "inception" else f"fd_{extractor_name}"
