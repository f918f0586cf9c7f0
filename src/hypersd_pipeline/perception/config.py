"""Which perceptual model, and where its weights are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hypersd_pipeline.config import Strict

Variant = Literal["solo", "solov2"]

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")]


class SoloConfig(Strict):
    """mmdet's SOLO (arXiv 1912.04488) or SOLOv2 (arXiv 2003.10152).

    Attributes:
        variant: which of the two; None: what a ``.safetensors`` says, and of mmdet's checkpoints SOLO, the paper's.
        weights: a ``.safetensors`` that ``kedro run --pipelines segmentation_model`` wrote, which says itself how its network is built; or
            a checkpoint of mmdet's (``.pth``), as a local file or an https address.
        sha256: of the file, or its first digits, eight at least (OpenMMLab writes them into the file's name); needed with an address,
            checked wherever given.
        mmdet_config: of a checkpoint of mmdet's, a name in mmdet's own ``configs``; None: ResNet-50 with FPN, as the paper has it.
        category_ids: COCO category ids of the checkpoint's classes, class 0 first; None: COCO2017's 80.
    """

    kind: Literal["solo"]
    variant: Variant | None = None
    weights: str = "data/06_models/segmentation_model/model.safetensors"
    sha256: Sha256 | None = None
    mmdet_config: str | None = None
    category_ids: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _address_with_hash(self) -> SoloConfig:
        if self.weights.startswith("http://"):
            raise ValueError("weights: give an https address or a local file")
        if self.weights.startswith("https://") and self.sha256 is None:
            raise ValueError("weights is an address, so sha256 (8 to 64 hexadecimal digits) of its file is needed")
        return self


class Mask2FormerConfig(Strict):
    """transformers' Mask2Former (arXiv 2112.01527).

    Attributes:
        weights: a local folder with ``config.json`` and ``model.safetensors``, or a hub id such as
            ``facebook/mask2former-swin-tiny-coco-instance``.
        revision: of the hub repository. sha256: of ``model.safetensors``, checked where given.
        category_ids: as of `SoloConfig`.
        score_threshold: predictions below are dropped.
    """

    kind: Literal["mask2former"]
    weights: str
    revision: str | None = None
    sha256: Sha256 | None = None
    category_ids: tuple[int, ...] | None = None
    score_threshold: float = Field(default=0.05, ge=0, lt=1)


PerceptualModelConfig = Annotated[SoloConfig | Mask2FormerConfig, Field(discriminator="kind")]


class SmallSoloConfig(Strict):
    """A SOLO or SOLOv2 for small pictures: a narrow ResNet-18 of three stages, a feature pyramid of three levels, GroupNorm everywhere.

    Attributes:
        input_size: the square that pictures are resized to. Masks have a quarter of it per side, so twice the data's size pays.
        base_channels: width of the backbone's first stage (then doubled twice). feat_channels: of pyramid and head.
        stacked_convs: convolutions of the head. groups: of every GroupNorm.
        num_grids, scale_ranges: per level, cells per side and the sizes (square root of the box's area, in pixels of ``input_size``) of the
            instances it is to find; the ranges overlap as in SOLO.
        score_threshold, max_per_image: of predictions.
    """

    variant: Variant = "solo"
    input_size: int = Field(default=128, ge=32, multiple_of=32)
    base_channels: int = Field(default=16, ge=8)
    feat_channels: int = Field(default=32, ge=8)
    stacked_convs: int = Field(default=2, ge=1)
    groups: int = Field(default=8, ge=1)
    num_grids: tuple[int, int, int] = (12, 8, 6)
    scale_ranges: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] = ((1, 48), (36, 80), (64, 2048))
    score_threshold: float = Field(default=0.05, ge=0, lt=1)
    max_per_image: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _whole_groups(self) -> SmallSoloConfig:
        if self.base_channels % self.groups or self.feat_channels % self.groups:
            raise ValueError(
                f"base_channels {self.base_channels} and feat_channels {self.feat_channels} must be multiples of groups {self.groups}"
            )
        return self
