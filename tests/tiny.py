"""Tiny random checkpoints in the full diffusers layout of SD1.5 and SDXL, written by the real pipelines' ``save_pretrained``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

RESOLUTION = 64  # pixels. The VAE's reduction is 8, as in the real ones
CAPTIONS = ["a red apple on a blue background", "two cats", "a green tree on the left"]


def _write_tokenizer(folder: Path, pad: str) -> None:
    """A CLIP tokenizer with one token a byte and a few merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]  # GPT-2's table: bytes without a printable form move above 255
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t")]
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def _tokenizer(folder: Path, pad: str = "<|endoftext|>") -> Any:
    from transformers import CLIPTokenizer

    _write_tokenizer(folder, pad)
    return CLIPTokenizer.from_pretrained(folder)


def _text_config(tokenizer: Any, width: int, projection: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=projection, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _vae(scaling_factor: float) -> Any:
    from diffusers import AutoencoderKL

    channels = (8, 8, 16, 16)
    return AutoencoderKL(
        block_out_channels=channels, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4, norm_num_groups=4, sample_size=RESOLUTION, scaling_factor=scaling_factor,
    )  # fmt: skip


def _unet(cross_attention_dim: int, **extra: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, attention_head_dim=2,
        cross_attention_dim=cross_attention_dim, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **extra,
    )  # fmt: skip


def _scheduler_config(prediction_type: str) -> dict[str, Any]:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    return {**betas, "prediction_type": prediction_type, "steps_offset": 1}


def write_sd15(root: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Write a random SD1.5-layout checkpoint (64 px, latents 4 x 8 x 8) and return its folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = _tokenizer(root / "tokenizer_source")
    pipe = StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=CLIPTextModel(_text_config(tokenizer, 32, 32)),
        tokenizer=tokenizer,
        unet=_unet(32),
        scheduler=DDIMScheduler(**_scheduler_config(prediction_type), clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(root / "sd15")
    return root / "sd15"


def write_sdxl(root: Path, prediction_type: str = "epsilon", seed: int = 0, zero_unconditional: bool = True) -> Path:
    """Write a random SDXL-layout checkpoint (64 px, latents 4 x 8 x 8) and return its folder."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    first, second = _tokenizer(root / "tokenizer_source"), _tokenizer(root / "tokenizer_2_source", pad="!")
    unet = _unet(
        32 + 48, addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 40, use_linear_projection=True,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=CLIPTextModel(_text_config(first, 32, 32)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(second, 48, 40)),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_scheduler_config(prediction_type)),
        force_zeros_for_empty_prompt=zero_unconditional,
        add_watermarker=False,
    )
    pipe.save_pretrained(root / "sdxl")
    return root / "sdxl"


def write_teacher(root: Path, layout: Literal["sd15", "sdxl"], prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """``write_sd15`` or ``write_sdxl``."""
    return {"sd15": write_sd15, "sdxl": write_sdxl}[layout](root, prediction_type, seed)


def load_pipeline(folder: Path) -> Any:
    """diffusers' own pipeline for a checkpoint of either layout."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
