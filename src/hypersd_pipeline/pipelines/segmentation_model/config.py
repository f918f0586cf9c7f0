"""What the training of the segmentation model is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hypersd_pipeline.config import Strict
from hypersd_pipeline.perception.config import SmallSoloConfig
from hypersd_pipeline.training.loop import LoopConfig


class SegmentationModelConfig(Strict):
    """Training and test of a small SOLO.

    Attributes:
        classes: ``object``: one class, the model only tells where things are; ``category``: a class per annotated category.
        resolution: pictures are fitted to this square, as the teacher's; the embedded data's own 64.
        flip: mirror every second picture.
        test_images: of a split at most, the first ones. grid_pictures: rows of the picture grid.
    """

    model: SmallSoloConfig = SmallSoloConfig()
    classes: Literal["object", "category"] = "object"
    resolution: int = Field(default=64, ge=32)
    flip: bool = True
    test_images: int = Field(default=1000, ge=1)
    grid_pictures: int = Field(default=8, ge=1)
    loop: LoopConfig
