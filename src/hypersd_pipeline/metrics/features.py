"""Image features for the Frechet distance."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.metrics.config import FeatureConfig
from hypersd_pipeline.models.dual_encoder import imagenet_normalise, load_efficientnet_, resize_images


class FeatureExtractor(Protocol):
    """``images [b, 3, h, w]`` float in [0, 1] -> features ``[b, d]`` float32.

    Attributes:
        name: the metric's name says it: ``fd_<name>``, or ``fid_inception``, the only one that is the FID.
    """

    name: str

    def __call__(self, images: Tensor) -> Tensor: ...


class EfficientNetLite0:
    """Pooled 1280-d features of the packaged ImageNet EfficientNet-Lite0, on images resized to ``resolution``."""

    name = "efficientnet_lite0"

    def __init__(self, resolution: int = 64, device: torch.device | str = "cpu", trunk: nn.Module | None = None) -> None:
        import timm

        if trunk is None:
            trunk = load_efficientnet_(timm.create_model("tf_efficientnet_lite0", num_classes=0)).eval().requires_grad_(False)
        self.trunk, self.resolution = trunk.to(device), resolution

    def __call__(self, images: Tensor) -> Tensor:
        return self.trunk(imagenet_normalise(resize_images(images, self.resolution)))


class Inception:
    """The FID's Inception-v3 (2048-d, TensorFlow weights) through torch-fidelity, on images rounded to 8 bits as the FID does.

    Raises:
        UserError: the weights file is missing or unreadable, or cannot be downloaded.
    """

    name = "inception"

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if weights is not None:
            _check_weights(weights)
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights) if weights else None).to(device)
        except (urllib.error.URLError, OSError) as error:
            raise UserError(
                f"evaluation.features: the Inception weights cannot be downloaded ({error}); give a local file in "
                f"evaluation.features.weights."
            ) from error
        except RuntimeError as error:
            raise UserError(
                f"{weights}: these are not the FID's Inception-v3 weights; use pt_inception-2015-12-05-6726825d.pth."
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        return self.network((images.clamp(0, 1) * 255).round().to(torch.uint8))[0]


def _check_weights(path: Path) -> None:
    """torch-fidelity unpickles freely, so a file that is more than tensors must be refused before it sees it."""
    if not path.exists():
        raise UserError(
            f"evaluation.features.weights: {path} does not exist; download pt_inception-2015-12-05-6726825d.pth there, or "
            f"use kind: efficientnet_lite0."
        )
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any unpickling failure
        raise UserError(
            f"{path}: not a file of tensors only ({type(error).__name__}); use pt_inception-2015-12-05-6726825d.pth."
        ) from error


def load_features(config: FeatureConfig, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor that the configuration names."""
    if config.kind == "inception":
        return Inception(config.weights, device)
    return EfficientNetLite0(config.resolution, device)


def metric_name(extractor_name: str) -> str:
    """``fid_inception`` for Inception-v3 and for nothing else; ``fd_<features>`` otherwise."""
    return "fid_inception" if extractor_name == "inception" else f"fd_{extractor_name}"
