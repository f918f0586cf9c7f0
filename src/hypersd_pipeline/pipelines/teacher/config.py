"""Configuration of the shipped teacher's training."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from hypersd_pipeline.config import Strict
from hypersd_pipeline.data.twemoji import TwemojiConfig
from hypersd_pipeline.pipelines.teacher.encoders import DualEncoderTraining, QualityHeadTraining
from hypersd_pipeline.training.loop import LoopConfig


class VaeConfig(Strict):
    """The autoencoder: 64 x 64 pixels to 8 x 8 latents.

    Attributes:
        block_out_channels: few at full resolution, where each costs most.
        kl_weight: of the mean Kullback-Leibler term per latent element; only keeps the posterior from collapsing to a point.
        mse_weight: of the squared error, added to the absolute error.
        crop, whole_images: steps see windows of ``crop`` pixels, as many as make up ``loop.batch_size`` whole images;
            this share of the steps sees whole images.
        decoder_loop: a second training of the decoder alone, with the latents as they are; None for none.
    """

    block_out_channels: tuple[int, ...] = (16, 32, 64, 128)
    layers_per_block: int = Field(default=1, ge=1)
    latent_channels: int = Field(default=8, ge=1)
    norm_num_groups: int = 8
    kl_weight: float = Field(default=1e-4, ge=0)
    mse_weight: float = Field(default=2.0, ge=0)
    crop: int = Field(default=32, ge=8)
    whole_images: float = Field(default=0.3, ge=0, le=1)
    ema_decay: float = Field(default=0.995, ge=0, lt=1)
    loop: LoopConfig
    decoder_loop: LoopConfig | None = None

    def identity(self) -> dict[str, Any]:
        """What the latents depend on."""
        return {**self.model_dump(mode="json", exclude={"decoder_loop"}), "loop": self.loop.identity()}


class UnetConfig(Strict):
    """The denoiser and its text encoder, trained together (Stable Diffusion takes its text encoder ready-made; ours has none to take).

    Attributes:
        caption_dropout: chance that a caption is replaced by "" (classifier-free guidance).
        min_snr_gamma: weight ``min(snr, gamma) / snr`` on the epsilon loss (arXiv 2303.09556).
        refine_loop: a second training that starts from the averaged weights of the first, with a new optimiser; None for none.
    """

    block_out_channels: tuple[int, ...] = (96, 192)
    layers_per_block: int = Field(default=2, ge=1)
    attention_head_dim: int = 6
    norm_num_groups: int = 16
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    max_tokens: int = Field(default=40, ge=8)
    vocabulary: int = Field(default=1600, ge=600)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    min_snr_gamma: float = Field(default=5.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    loop: LoopConfig
    refine_loop: LoopConfig | None = None


class TeacherTrainingConfig(Strict):
    """Everything ``kedro run --pipelines teacher`` trains.

    Attributes:
        data: the scenes; only the train split is trained on.
        encoder_images: how many of them the dual encoder and the image-quality head see.

    """

    data: TwemojiConfig
    vae: VaeConfig
    unet: UnetConfig
    encoder_images: int = Field(default=8000, ge=10)
    dual_encoder: DualEncoderTraining = DualEncoderTraining()
    quality_head: QualityHeadTraining = QualityHeadTraining()
