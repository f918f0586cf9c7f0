"""Wiring of the reward models' training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.data.preferences import make_preferences
from hypersd_pipeline.recipes.reward import train_held_out, train_text_image


def reward_pipeline(name: str, function: Callable[..., Any]) -> Pipeline:
    """One reward, in the namespace ``reward_<name>``, with the outputs ``<name>_reward`` and ``report_reward_<name>``."""
    node = Node(
        function,
        {"pairs": "reward_pairs", "training": "params:training", "checkpoints": "checkpoints", "metric_stream": "metric_stream"},
        ["reward", "report"],
        name="train",
    )
    outputs = {"reward": f"{name}_reward", "report": f"report_reward_{name}"}
    return Pipeline([node], namespace=f"reward_{name}", inputs={"reward_pairs"}, outputs=outputs)


def create_pipeline(**_: Any) -> Pipeline:
    """``manifest``, or a user's file -> ``reward_pairs``, ``rejected_pairs`` -> ``text_image_reward`` and ``held_out_reward``."""
    pairs = Node(make_preferences, ["manifest", "params:reward_pairs"], ["reward_pairs", "rejected_pairs"], name="make_preferences")
    return Pipeline([pairs]) + reward_pipeline("text_image", train_text_image) + reward_pipeline("held_out", train_held_out)
