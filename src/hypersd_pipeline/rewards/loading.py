"""From a configuration to a reward."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.rewards.base import Reward
from hypersd_pipeline.rewards.hps_v2 import HpsV2Config
from hypersd_pipeline.rewards.image_reward import ImageRewardConfig
from hypersd_pipeline.rewards.laion_aesthetic import LaionAestheticConfig
from hypersd_pipeline.rewards.pick_score import PickScoreConfig
from hypersd_pipeline.rewards.shipped_quality import ShippedQualityConfig
from hypersd_pipeline.rewards.text_image import TextImageConfig, TextImageReward

RewardConfig = Annotated[
    LaionAestheticConfig | ImageRewardConfig | PickScoreConfig | HpsV2Config | ShippedQualityConfig | TextImageConfig,
    Field(discriminator="kind"),
]
"""The configuration of any reward. ``kind`` tells which. Each has ``files() -> list[Path]`` and ``load(device) -> Reward``."""


def load_reward(config: RewardConfig, device: torch.device | str = "cpu", *, to_train_on: bool = True) -> Reward:
    """The reward that a configuration names, frozen and in ``eval``. All files are found and checked before a network is built.

    Args:
        to_train_on: the reward's gradient will train a model, which the held-out reward must never do.

    Raises:
        UserError: a file is missing, damaged, or of another architecture, or the held-out reward is to be trained on.
    """
    reward = config.load(device)
    held_out = isinstance(reward, TextImageReward) and reward.role == "held_out"
    if to_train_on and held_out and isinstance(config, TextImageConfig):
        raise UserError(f"{config.weights}: is the held-out reward, which only reports; train on the file of text_image_reward.")
    return reward
