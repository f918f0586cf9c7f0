"""Configuration of the shipped teacher's training."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from hypersd_pipeline.config import Decay, Share, Side, Strict, Weight, Width
from hypersd_pipeline.data.twemoji import TwemojiConfig
from hypersd_pipeline.models.dual_encoder import DualEncoderConfig
from hypersd_pipeline.training.loop import LoopConfig


class VaeConfig(Strict):
    """The autoencoder: 64 x 64 pixels to 8 x 8 latents.

    Attributes:
        block_out_channels: few at full resolution, where each costs most.
        kl_weight: of the mean Kullback-Leibler term per latent element, which only keeps the posterior from collapsing to a point.
        mse_weight: of the squared error, added to the absolute error.
        crop: most steps see windows of so many pixels, as many as make up ``loop.batch_size`` whole images.
        whole_images: the share of the steps that see whole images.
        decoder_loop: a second training of the decoder alone, with the latents as they are. None for none.
    """

    block_out_channels: tuple[Width, ...] = Field(min_length=1)
    layers_per_block: int = Field(default=1, ge=1, le=16)
    latent_channels: Width
    norm_num_groups: Width = 8
    kl_weight: Weight
    mse_weight: Weight
    crop: Side = 32
    whole_images: Share = 0.3
    ema_decay: Decay
    loop: LoopConfig
    decoder_loop: LoopConfig | None = None

    def identity(self) -> dict[str, Any]:
        """What the latents depend on."""
        return {**self.model_dump(mode="json", exclude={"decoder_loop"}), "loop": self.loop.identity()}


class UnetConfig(Strict):
    """The denoiser and its text encoder, trained together.

    Stable Diffusion takes its text encoder ready-made. There is none of this size to take.

    Attributes:
        caption_dropout: chance that a caption is replaced by "" (classifier-free guidance).
        min_snr_gamma: weight ``min(snr, gamma) / snr`` on the epsilon loss (arXiv 2303.09556).
        refine_loop: a second training that starts from the averaged weights of the first, with a new optimiser. None for none.
    """

    block_out_channels: tuple[Width, ...] = Field(min_length=1)
    layers_per_block: int = Field(default=2, ge=1, le=16)
    attention_head_dim: Width
    norm_num_groups: Width = 16
    text_width: Width = 128
    text_layers: int = Field(default=3, ge=1, le=64)
    text_heads: Width = 4
    max_tokens: int = Field(ge=8, le=1024)
    vocabulary: int = Field(default=1600, ge=600, le=10**6)
    caption_dropout: Decay = 0.1
    min_snr_gamma: float = Field(default=5.0, gt=0, le=1e6)
    ema_decay: Decay
    loop: LoopConfig
    refine_loop: LoopConfig | None = None


class DualEncoderTraining(Strict):
    """How the dual encoder's two projections and its logit scale are trained (InfoNCE).

    Attributes:
        model: the encoder's shape.
        feature_dropout: on the towers' features. They are computed once, so this is the only augmentation.
        loop: the optimisation. ``batch_size / accumulate`` is also the number of candidates in the loss, at least two.
    """

    model: DualEncoderConfig = DualEncoderConfig()
    feature_dropout: Decay = 0.3
    loop: LoopConfig

    @field_validator("loop")
    @classmethod
    def _has_negatives(cls, loop: LoopConfig) -> LoopConfig:
        if loop.batch_size // loop.accumulate < 2:
            raise ValueError("batch_size / accumulate must be at least 2: a single pair has no negatives")
        return loop


class QualityHeadTraining(Strict):
    """How the image-quality head is trained (pairwise ranking, eq. 9).

    Attributes:
        hidden: width of its two layers.
        images: how many clean images are used. One in ten is held out for the pair accuracy.
        pairs_per_image: degraded versions of each.
        loop: the optimisation. ``batch_size`` counts pairs, and ``seed`` is the degradations' too.
    """

    hidden: Width = 128
    images: int = Field(default=4000, ge=10, le=10**9)
    pairs_per_image: int = Field(default=6, ge=1, le=1000)
    loop: LoopConfig


class TeacherTrainingConfig(Strict):
    """Everything ``kedro run --pipelines teacher`` trains.

    Attributes:
        data: the scenes. Only the train split is trained on.
        vae: the autoencoder.
        unet: the denoiser and its text encoder.
        encoder_images: how many scenes the dual encoder and the image-quality head see.
        dual_encoder: the dual encoder.
        quality_head: the image-quality head.
    """

    data: TwemojiConfig
    vae: VaeConfig
    unet: UnetConfig
    encoder_images: int = Field(default=8000, ge=10, le=10**9)
    dual_encoder: DualEncoderTraining
    quality_head: QualityHeadTraining
