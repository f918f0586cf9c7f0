"""From a configuration to a reward."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.rewards.base import Reward
from hypersd_pipeline.rewards.hps_v2 import HpsV2Config, load_hps_v2
from hypersd_pipeline.rewards.image_reward import ImageRewardConfig, load_image_reward
from hypersd_pipeline.rewards.laion_aesthetic import LaionAestheticConfig, load_laion_aesthetic
from hypersd_pipeline.rewards.pick_score import PickScoreConfig, load_pick_score
from hypersd_pipeline.rewards.shipped_quality import ShippedQualityConfig, load_shipped_quality
from hypersd_pipeline.rewards.text_image import TextImageConfig, load_text_image

RewardConfig = Annotated[
    LaionAestheticConfig | ImageRewardConfig | PickScoreConfig | HpsV2Config | ShippedQualityConfig | TextImageConfig,
    Field(discriminator="kind"),
]
"""The configuration of any reward; ``kind`` tells which."""


def load_reward(config: RewardConfig, device: torch.device | str = "cpu", *, to_train_on: bool = True) -> Reward:
    """The reward that a configuration names, frozen and in ``eval``. All files are found and checked before a network is built.

    Args:
        to_train_on: the reward's gradient will train a model, which the held-out reward must never do.

    Raises:
        UserError: a file is missing, damaged, or of another architecture, or the held-out reward is to be trained on.
    """
    match config:
        case LaionAestheticConfig():
            return load_laion_aesthetic(config, device)
        case ImageRewardConfig():
            return load_image_reward(config, device)
        case PickScoreConfig():
            return load_pick_score(config, device)
        case HpsV2Config():
            return load_hps_v2(config, device)
        case ShippedQualityConfig():
            return load_shipped_quality(config, device)
        case TextImageConfig():
            reward = load_text_image(config, device)
            if to_train_on and reward.role == "held_out":
                raise UserError(f"{config.weights}: is the held-out reward, which only reports; train on the file of text_image_reward.")
            return reward
