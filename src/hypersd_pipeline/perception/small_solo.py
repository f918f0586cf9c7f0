"""The shape of the small SOLO."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hypersd_pipeline.config import Count, Strict, Width

Variant = Literal["solo", "solov2"]


class SmallSoloConfig(Strict):
    """A SOLO or SOLOv2 for small images: a narrow ResNet-18 of three stages, a feature pyramid of three levels, GroupNorm everywhere.

    Attributes:
        input_size: the square that images are resized to. Masks have a quarter of it per side, so twice the data's size pays.
        base_channels: width of the backbone's first stage (then doubled twice). feat_channels: of pyramid and head.
        stacked_convs: convolutions of the head. groups: of every GroupNorm.
        num_grids, scale_ranges: per level, cells per side and the sizes (square root of the box's area, in pixels of ``input_size``) of the
            instances it is to find. The ranges overlap as in SOLO.
        score_threshold, max_per_image: of predictions.
    """

    variant: Variant = "solo"
    input_size: int = Field(default=128, ge=32, le=8192, multiple_of=32)
    base_channels: int = Field(default=16, ge=8, le=1024)
    feat_channels: int = Field(default=32, ge=8, le=1024)
    stacked_convs: int = Field(default=2, ge=1, le=16)
    groups: Width = 8
    num_grids: tuple[Width, Width, Width] = (12, 8, 6)
    scale_ranges: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] = ((1, 48), (36, 80), (64, 2048))
    score_threshold: float = Field(default=0.05, ge=0, lt=1)
    max_per_image: Count = 20

    @model_validator(mode="after")
    def _whole_groups(self) -> SmallSoloConfig:
        if self.base_channels % self.groups or self.feat_channels % self.groups:
            raise ValueError(
                f"base_channels {self.base_channels} and feat_channels {self.feat_channels} must be multiples of groups {self.groups}"
            )
        return self
