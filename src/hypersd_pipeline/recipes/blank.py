"""Judges of the published architectures without their files: with the weights that their classes start with."""

from __future__ import annotations

import json
from typing import Any

import torch

from hypersd_pipeline.models.public import FOLDER
from hypersd_pipeline.perception.config import Mask2FormerConfig, PerceptualModelConfig, SmallSoloConfig
from hypersd_pipeline.perception.protocol import COCO_CATEGORY_IDS, LabelMap, PerceptualModel
from hypersd_pipeline.perception.solo import Solo, SoloConfig
from hypersd_pipeline.rewards import Reward, RewardConfig
from hypersd_pipeline.rewards.hps_v2 import HpsV2, HpsV2Config
from hypersd_pipeline.rewards.image_reward import ImageReward, ImageRewardConfig
from hypersd_pipeline.rewards.laion_aesthetic import LaionAesthetic, LaionAestheticConfig
from hypersd_pipeline.rewards.open_clip_model import check_open_clip, open_clip_sizes
from hypersd_pipeline.rewards.pick_score import PickScore, PickScoreConfig
from hypersd_pipeline.rewards.predictor import PredictorHead


def blank_clip(name: str, key: str) -> Any:
    """An ``open_clip`` architecture."""
    from open_clip.model import CLIP

    return CLIP(**open_clip_sizes(check_open_clip(name, key)))


def pick_score_network() -> Any:
    """PickScore's CLIP: ViT-H/14."""
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**json.loads((FOLDER / "pick_score.json").read_text(encoding="utf-8"))["config"]))


def blank_reward(config: RewardConfig) -> Reward:
    """A reward of the published architecture. The packaged ones have their own weights."""
    match config:
        case LaionAestheticConfig():
            width = check_open_clip(config.clip_model, "laion_aesthetic.clip_model")["embed_dim"]
            return LaionAesthetic(blank_clip(config.clip_model, "laion_aesthetic.clip_model").visual, PredictorHead(width))
        case ImageRewardConfig():
            return ImageReward(config.shape)
        case PickScoreConfig():
            return PickScore(pick_score_network())
        case HpsV2Config():
            return HpsV2(blank_clip(config.clip_model, "hps_v2.clip_model"))
    return config.load(torch.device("cpu"))


def blank_perceptual(config: PerceptualModelConfig) -> PerceptualModel:
    """A segmenter of the published architecture. Files that are there, such as the packaged one, are read.

    Raises:
        UserError: a Mask2Former is not there, whose architecture only its own files tell.
    """
    if isinstance(config, Mask2FormerConfig | SmallSoloConfig) or config.weights.endswith(".safetensors"):
        return config.load(torch.device("cpu"))  # type: ignore[union-attr]
    return Solo(solo_network(config).float(), LabelMap(category_ids=COCO_CATEGORY_IDS, names=tuple(map(str, COCO_CATEGORY_IDS))), "solo")


def solo_network(config: SoloConfig) -> Any:
    """mmdet's network of a published checkpoint."""
    from hypersd_pipeline.perception import mmdet_nets

    return mmdet_nets.published_solo(config.variant or "solo", config.mmdet_config)
