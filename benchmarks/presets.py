"""Models of the benchmark: the packaged teacher, or the published sizes with random weights. Cost does not depend on the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hypersd_pipeline  # noqa: F401  # before anything imports torchvision
from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.backbones import Backbone, UNetBackbone
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
"""LCM-LoRA's and Hyper-SD's target modules."""

_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


@dataclass(frozen=True)
class Preset:
    """Sizes of one set of models, as keyword arguments of diffusers' and transformers' classes. ``unet`` None is the packaged teacher.

    Attributes:
        batch, resolution (pixels), rank: defaults of the command line.
        downscale: image side over latent side. tokens: length of a prompt.
        text: one set for each text encoder.
    """

    batch: int
    resolution: int
    rank: int
    downscale: int = 8
    tokens: int = 77
    unet: dict[str, Any] | None = None
    vae: dict[str, Any] = field(default_factory=dict)
    text: tuple[dict[str, Any], ...] = ()


def _text(width: int, layers: int, heads: int, **extra: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 4 * width}
    return {**sizes, "projection_dim": width, "vocab_size": 49408, **extra}


def _vae(channels: tuple[int, ...], **extra: Any) -> dict[str, Any]:
    n = len(channels)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n}
    return {"block_out_channels": channels, "layers_per_block": 2, "latent_channels": 4, **blocks, **extra}


_SD_VAE = _vae((128, 256, 512, 512))

PRESETS = {
    "tiny": Preset(
        batch=2,
        resolution=32,
        rank=2,
        downscale=4,
        unet={
            "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 8, "cross_attention_dim": 32,
            "down_block_types": (_CROSS_DOWN, "DownBlock2D"), "up_block_types": ("UpBlock2D", _CROSS_UP),
        },
        vae=_vae((8, 16, 16), norm_num_groups=4),
        text=(_text(32, 2, 2, vocab_size=100),),
    ),
    "tiny-sdxl": Preset(
        batch=2,
        resolution=32,
        rank=2,
        downscale=4,
        unet={
            "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": (2, 4), "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", _CROSS_DOWN), "up_block_types": (_CROSS_UP, "UpBlock2D"),
            "transformer_layers_per_block": (1, 2), "cross_attention_dim": 80, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 48,
        },
        vae=_vae((8, 16, 16), norm_num_groups=4),
        text=(_text(32, 2, 2, vocab_size=100), _text(48, 2, 2, vocab_size=100)),
    ),
    "shipped": Preset(batch=64, resolution=64, rank=16, tokens=36),
    # diffusers' defaults are SD1.5's layout, but for the width of the text
    "sd15": Preset(batch=1, resolution=512, rank=64, unet={"cross_attention_dim": 768}, vae=_SD_VAE, text=(_text(768, 12, 12),)),
    # every width of SD1.5 times 0.4, and the rank too, so that UNet, LoRA, VAE and text keep their proportions
    "sd15-blocks": Preset(
        batch=2,
        resolution=256,
        rank=26,
        unet={"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 320},
        vae=_vae((48, 96, 208, 208), norm_num_groups=16),
        text=(_text(320, 12, 8),),
    ),
    "sdxl": Preset(
        batch=1,
        resolution=1024,
        rank=64,
        unet={
            "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
            "down_block_types": ("DownBlock2D", _CROSS_DOWN, _CROSS_DOWN), "up_block_types": (_CROSS_UP, _CROSS_UP, "UpBlock2D"),
            "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        vae=_SD_VAE,
        text=(_text(768, 12, 12), _text(1280, 32, 20, hidden_act="gelu")),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class FixedRows:
    """A training split in memory, as a stage reads it (`hypersd_pipeline.data.cache.SplitCache`): one batch, whatever is asked for.

    It lies on the device, so that no step pays for reading or copying.
    """

    latents: Tensor
    cond: Conditioning
    uncond: Conditioning

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(c, h, w)``."""
        c, h, w = self.latents.shape[1:]
        return c, h, w

    def sample(self, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        """The latents."""
        return self.latents

    def conditioning(self, indices: Tensor, generator: torch.Generator | None = None) -> Conditioning:
        """Their text."""
        return self.cond

    def captions(self, indices: Tensor, generator: torch.Generator | None = None) -> list[str]:
        """One for each row."""
        return ["an image"] * len(self)

    def unconditional(self, n: int, sizes: Tensor | None = None) -> Conditioning:
        """The other half of guidance."""
        return self.uncond


class Models:
    """Builds a preset's models. Each call makes a new, frozen one on the device. Also makes batches of what they take.

    Attributes: ``process``: that the networks were trained for.

    Args:
        dtype: of all weights. The VAE has it too: the best case for a step that encodes images.

    Raises:
        UserError: the resolution does not fit the networks' strides.
    """

    def __init__(self, preset: Preset, *, batch: int, resolution: int, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        stride = preset.downscale * (2 ** (len(preset.unet.get("block_out_channels", (0,) * 4)) - 1) if preset.unet else 2)
        if resolution % stride:
            raise UserError(f"--resolution {resolution} is no multiple of {stride}, which this preset's networks need.")
        self.preset, self.batch, self.resolution, self.dtype, self.device, self.seed = preset, batch, resolution, dtype, device, seed
        self.latent_size = resolution // preset.downscale
        self.process = Process.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})

    def backbone(self) -> Backbone:
        """diffusers' ``UNet2DConditionModel`` in the project's class."""
        from diffusers import UNet2DConditionModel

        if self.preset.unet is None:
            return self._shipped("backbone").backbone
        sizes = {"sample_size": self.latent_size, **self.preset.unet}
        return UNetBackbone(self._random(lambda: UNet2DConditionModel(**sizes)))

    def vae(self) -> Any:
        """diffusers' ``AutoencoderKL``."""
        from diffusers import AutoencoderKL

        if self.preset.unet is None:
            return self._shipped("vae").vae
        return self._random(lambda: AutoencoderKL(**self.preset.vae))

    def text_encoders(self) -> list[Any]:
        """transformers' CLIP text encoders: one, or SDXL's two, of which the second projects."""
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        if self.preset.unet is None:
            return self._shipped("text").text_encoders
        classes = (CLIPTextModel, CLIPTextModelWithProjection)
        return [
            self._random(lambda c=c, s=s: c(CLIPTextConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, **s)))  # type: ignore[misc]
            for c, s in zip(classes, self.preset.text, strict=False)
        ]

    def rows(self, backbone: Backbone) -> FixedRows:
        """The rows that a step is made from: latents ``[b, c, h, w]`` and their text, on the device."""
        cond = self._conditioning(backbone.module.config)
        return FixedRows(self._latents(backbone.module.config), cond, cond[torch.zeros(self.batch, dtype=torch.int64, device=self.device)])

    def _latents(self, config: Any) -> Tensor:
        """Clean latents as the cache gives them: float32."""
        shape = (self.batch, config.in_channels, self.latent_size, self.latent_size)
        return torch.randn(shape, generator=self._generator()).to(self.device)

    def _conditioning(self, config: Any) -> Conditioning:
        """Text of the batch as the cache gives it: ``[b, L, D]``, for SDXL with pooled ``[b, P]`` and sizes ``[b, 6]``."""
        generator = self._generator()
        embeds = torch.randn(self.batch, self.preset.tokens, config.cross_attention_dim, generator=generator)
        if config.addition_embed_type != "text_time":
            return Conditioning(embeds).to(self.device, self.dtype)
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([[self.resolution, self.resolution, 0, 0, self.resolution, self.resolution]], dtype=torch.float32)
        pooled = torch.randn(self.batch, width, generator=generator)
        return Conditioning(embeds, pooled, sizes.repeat(self.batch, 1)).to(self.device, self.dtype)

    def images(self) -> Tensor:
        """Images in [-1, 1]: float32 ``[b, 3, resolution, resolution]``."""
        shape = (self.batch, 3, self.resolution, self.resolution)
        return (2 * torch.rand(shape, generator=self._generator()) - 1).to(self.device)

    def token_ids(self) -> Tensor:
        """Prompts: int64 ``[b, L]``, ending in the end mark, id 1."""
        ids = torch.randint(2, 100, (self.batch, self.preset.tokens), generator=self._generator())
        ids[:, -1] = 1
        return ids.to(self.device)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _shipped(self, part: Any) -> Any:
        name: Any = str(self.dtype).removeprefix("torch.")
        teacher = load_teacher(TeacherConfig(dtype=name, vae_dtype=name), parts=(part,), device=self.device)
        self.process = teacher.process
        return teacher

    def _random(self, make: Callable[[], Any]) -> Any:
        default = torch.get_default_dtype()
        torch.manual_seed(self.seed)
        torch.set_default_dtype(self.dtype)  # not cast afterwards: a float32 copy would show in the peak memory
        try:
            with self.device:
                model = make()
        finally:
            torch.set_default_dtype(default)
        return model.to(self.device).requires_grad_(False).eval()
