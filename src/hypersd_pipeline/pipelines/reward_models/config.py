"""Configuration of the reward models' training."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from hypersd_pipeline.config import Strict
from hypersd_pipeline.rewards.text_image import TextImageHeadConfig
from hypersd_pipeline.training.loop import LoopConfig


class PairsConfig(Strict):
    """Where preference pairs come from.

    Attributes:
        file: a ``.jsonl`` with ``prompt``, ``winner`` and ``loser`` (pictures, relative to the file) a line; None: pairs are made from the
            data set, and everything below counts.
        images: pictures of the split ``train``; one half, by a hash of the id, trains the text-image reward, the other the held-out one.
        test_images: of the split ``test``.
        degraded: worse versions of each picture.
        wrong_captions, similar_captions: other pictures' captions for each: any, and one of the ``neighbours`` most similar ones.
        seed: of degradations and captions.
    """

    file: Path | None = None
    images: int = Field(default=3000, ge=4)
    test_images: int = Field(default=500, ge=2)
    degraded: int = Field(default=2, ge=1)
    wrong_captions: int = Field(default=4, ge=1)
    similar_captions: int = Field(default=8, ge=0)
    neighbours: int = Field(default=16, ge=1)
    seed: int = 0


class RewardTrainingConfig(Strict):
    """How one reward is trained (eq. 9).

    Attributes:
        head: its shape.
        feature_dropout: on the towers' features; they are computed once, so this is the only augmentation.
        loop: the optimisation; ``batch_size`` counts pairs.
    """

    head: TextImageHeadConfig = TextImageHeadConfig()
    feature_dropout: float = Field(default=0.4, ge=0, lt=1)
    loop: LoopConfig
