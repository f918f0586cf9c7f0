"""Reward models of aesthetic feedback (paper 3.2): one protocol, one file a model, and one way to load them."""

from hypersd_pipeline.rewards.base import Reward, straight_through_clamp
from hypersd_pipeline.rewards.loading import RewardConfig, load_reward

__all__ = ["Reward", "RewardConfig", "load_reward", "straight_through_clamp"]
