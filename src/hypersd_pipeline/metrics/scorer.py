"""All that is measured on a batch of images, with one pass through each network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hypersd_pipeline.metrics.clip_score import load_clip
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.features import EfficientNetLite0, centre_crop, crop_side, load_features, metric_name
from hypersd_pipeline.models.dual_encoder import DualEncoder, load_dual_encoder
from hypersd_pipeline.models.quality_head import load_quality_head
from hypersd_pipeline.rewards import load_reward


@dataclass(frozen=True)
class Scores:
    """Of ``n`` images, float32 on the CPU: Frechet ``features [n, d]``, unit image ``embeddings [n, e]``, ``quality [n]``, ``rewards``.

    Attributes:
        crops: Frechet features ``[n, d]`` of the middle of each image (`crop_side`).
        rewards: name -> ``[n]``, of each reward of the configuration.
    """

    FIELDS: ClassVar = ("features", "embeddings", "quality", "crops")
    features: Tensor
    embeddings: Tensor
    quality: Tensor
    crops: Tensor
    rewards: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def cat(parts: Sequence[Scores]) -> Scores:
        """Concatenate along the images."""
        rewards = {name: torch.cat([part.rewards[name] for part in parts]) for name in parts[0].rewards}
        return Scores(**{name: torch.cat([getattr(part, name) for part in parts]) for name in Scores.FIELDS}, rewards=rewards)


class Scorer:
    """The feature extractor, the image-text encoder and the image-quality head of one configuration.

    Attributes:
        distance: the Frechet metric's name, ``fd_efficientnet_lite0`` or ``fid_inception``.
    """

    def __init__(self, config: EvaluationConfig, device: torch.device | str = "cpu") -> None:
        self.features = load_features(config.features, device)
        self.clip = load_clip(config.clip, device)
        self.dual = self.clip if isinstance(self.clip, DualEncoder) else load_dual_encoder().to(device)
        self.head = load_quality_head(self.dual)
        self.rewards = [load_reward(reward, device, to_train_on=False) for reward in config.rewards]
        self.distance = metric_name(self.features.name)
        self.device = torch.device(device)
        # One trunk serves both where both see the same pixels: the vision tower is two thirds of the cost of scoring.
        self.shared = isinstance(self.features, EfficientNetLite0) and self.features.side == self.dual.config.image_size

    @torch.inference_mode()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Scores of ``[b, 3, h, w]`` in [0, 1], and of ``b`` prompts where a reward reads them."""
        images = images.to(self.device, torch.float32)
        features = self.features(images)
        dual = self.dual.project_images(features) if self.shared else self.dual.encode_images(images)
        embeddings = dual if self.clip is self.dual else self.clip.encode_images(images)
        rewards = {reward.name: reward.score(images, prompts).float().cpu() for reward in self.rewards}
        crops = self.features(centre_crop(images, crop_side(self.features, min(images.shape[-2:]))))
        return Scores(features.float().cpu(), embeddings.float().cpu(), self.head(dual).float().cpu(), crops.float().cpu(), rewards)

    @torch.inference_mode()
    def text_embeddings(self, prompts: list[str], batch_size: int = 64) -> Tensor:
        """Unit vectors ``[n, e]`` of the prompts."""
        return torch.cat([self.clip.encode_texts(prompts[i : i + batch_size]).float().cpu() for i in range(0, len(prompts), batch_size)])
