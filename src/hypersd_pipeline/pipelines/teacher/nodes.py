"""Nodes of the teacher pipeline: data in, a diffusers folder out."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hypersd_pipeline.data import twemoji
from hypersd_pipeline.diffusion.grids import trailing_timesteps
from hypersd_pipeline.metrics.grids import captioned_grid, to_pil
from hypersd_pipeline.models.dual_encoder import DualEncoder, save_dual_encoder
from hypersd_pipeline.models.quality_head import QualityHead, save_quality_head
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.pipelines.evaluation.sampling import generate
from hypersd_pipeline.pipelines.teacher import encoders
from hypersd_pipeline.pipelines.teacher import unet as denoiser_training
from hypersd_pipeline.pipelines.teacher import vae as vae_training
from hypersd_pipeline.pipelines.teacher.config import TeacherTrainingConfig
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.loop import MetricStream


def generate_scenes(config: TeacherTrainingConfig) -> Callable[[Path], None]:
    """A writer of the data set that the teacher is trained on."""
    return functools.partial(twemoji.write_dataset, config=config.data)


def read_split(dataset: Path, split: str) -> tuple[Tensor, list[str]]:
    """Images uint8 ``[n, h, w, 3]`` and captions of one split of a generated data set, in file order."""
    content = json.loads((dataset / "annotations" / f"captions_{split}.json").read_text())
    caption = {a["image_id"]: a["caption"] for a in content["annotations"]}
    images = torch.from_numpy(np.stack([np.asarray(Image.open(dataset / split / i["file_name"])) for i in content["images"]]))
    return images, [caption[i["id"]] for i in content["images"]]


def _data_key(config: TeacherTrainingConfig) -> str:
    return json.dumps(config.data.model_dump(), sort_keys=True)


def train_vae(dataset: Path, config: TeacherTrainingConfig, checkpoints: CheckpointStore, metric_stream: MetricStream) -> Any:
    """Train the autoencoder on the train split."""
    images, _ = read_split(dataset, "train")
    return vae_training.train_vae(images, config.vae, _data_key(config), checkpoints, metric_stream)


def encode_latents(dataset: Path, vae: Any) -> tuple[Tensor, Tensor]:
    """Posterior mean and std of the train split, two float32 ``[n, c, h, w]``; decoder and denoiser are trained on them."""
    return vae_training.encode_all(vae, read_split(dataset, "train")[0])


def train_decoder(
    dataset: Path,
    vae: Any,
    latents: tuple[Tensor, Tensor],
    config: TeacherTrainingConfig,
    checkpoints: CheckpointStore,
    metric_stream: MetricStream,
) -> Any:
    """Train the decoder on, with the latents as they are."""
    images, _ = read_split(dataset, "train")
    return vae_training.train_decoder(vae, images, latents, config.vae, _data_key(config), checkpoints, metric_stream)


def train_unet(
    dataset: Path,
    latents: tuple[Tensor, Tensor],
    config: TeacherTrainingConfig,
    checkpoints: CheckpointStore,
    metric_stream: MetricStream,
) -> denoiser_training.Denoiser:
    """Train the denoiser and its text encoder on the train split."""
    captions = read_split(dataset, "train")[1]
    key = _data_key(config) + json.dumps(config.vae.identity(), sort_keys=True)
    return denoiser_training.train_unet(latents, captions, config.unet, key, checkpoints, metric_stream)


@torch.no_grad()
def measure_vae(dataset: Path, vae: Any) -> dict[str, Any]:
    """Reconstruction on the test and unseen splits: mean over images of the peak signal-to-noise ratio, in dB for pixels in [0, 255]."""
    figures: dict[str, Any] = {}
    for split in ("test", "test_unseen"):
        images, _ = read_split(dataset, split)
        errors = []
        for batch in images.split(64):
            pixels = vae_training.to_unit_range(batch)
            restored = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
            errors.append((restored - pixels).square().mean(dim=(1, 2, 3)) / 4)
        psnr = -10 * torch.log10(torch.cat(errors))
        figures[f"vae_psnr_{split}"] = float(psnr.mean())
        figures[f"vae_psnr_{split}_n"] = len(psnr)
    return figures


def train_dual_encoder(dataset: Path, config: TeacherTrainingConfig) -> tuple[DualEncoder, dict[str, Any]]:
    """Train the two projections of the dual encoder; figures are text-to-image R@1 on the test and unseen splits."""
    images, captions = encoders.read_pairs(dataset, "train", config.encoder_images)
    encoder, losses = encoders.train_dual_encoder(images, captions, config.dual_encoder)
    figures: dict[str, Any] = {"dual_encoder_loss": losses[-1]}
    for split in ("test", "test_unseen"):
        held_out = encoders.read_pairs(dataset, split, 500)
        figures[f"dual_encoder_r_at_1_{split}"] = encoders.retrieval_at_1(encoder, *held_out)
        figures[f"dual_encoder_r_at_1_{split}_n"] = len(held_out[1])
    return encoder, figures


def train_quality_head(dataset: Path, encoder: DualEncoder, config: TeacherTrainingConfig) -> tuple[QualityHead, dict[str, Any]]:
    """Train the image-quality head; figures are its accuracy on held-out clean-against-degraded pairs."""
    images, _ = encoders.read_pairs(dataset, "train", config.encoder_images)
    return encoders.train_quality_head(images, encoder, config.quality_head)


def export_encoders(
    encoder: DualEncoder, head: QualityHead, encoder_figures: dict[str, Any], head_figures: dict[str, Any], config: TeacherTrainingConfig
) -> Callable[[Path], None]:
    """A writer of ``dual_encoder.safetensors`` and ``quality_head.safetensors``, each with its recipe."""

    def write(folder: Path) -> None:
        data = config.data.model_dump()
        save_dual_encoder(
            encoder,
            folder / "dual_encoder.safetensors",
            {"data": data, "training": config.dual_encoder.model_dump(mode="json"), **encoder_figures},
        )
        save_quality_head(
            head,
            encoder,
            folder / "quality_head.safetensors",
            {"data": data, "training": config.quality_head.model_dump(mode="json"), **head_figures},
        )

    return write


def export_teacher(
    vae: Any, denoiser: denoiser_training.Denoiser, figures: dict[str, Any], config: TeacherTrainingConfig
) -> Callable[[Path], None]:
    """A writer of the diffusers folder: fp16 safetensors, recipe and sha256 of every file."""
    return functools.partial(_write_teacher, vae=vae, denoiser=denoiser, figures=figures, config=config)


def _write_teacher(
    folder: Path, *, vae: Any, denoiser: denoiser_training.Denoiser, figures: dict[str, Any], config: TeacherTrainingConfig
) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    denoiser.tokenizer.backend_tokenizer.no_truncation()  # left over from the training's own calls
    denoiser.tokenizer.backend_tokenizer.no_padding()
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=denoiser.text_encoder.half(),
        tokenizer=denoiser.tokenizer,
        unet=denoiser.unet.half(),
        scheduler=DDIMScheduler(**denoiser_training.SCHEDULER_CONFIG),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # stored in fp16 for its size, opened in float32 like the UNet: transformers obeys the config's dtype, diffusers has none there
    text_config = folder / "text_encoder" / "config.json"
    text_config.write_text(json.dumps({**json.loads(text_config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    (folder / "recipe.json").write_text(json.dumps({"config": config.model_dump(mode="json"), "figures": figures}, indent=2) + "\n")
    write_checksums(folder)


def sample_teacher(folder: Path, dataset: Path, config: TeacherTrainingConfig) -> Image.Image:
    """The first 32 test captions, each sampled once: 25 DDIM steps, guidance scale 3, noise by ``unet.loop.seed``."""
    teacher = load_teacher(TeacherConfig(source=str(folder)))
    _, captions = read_split(dataset, "test")
    prompts = captions[:32]
    batches = generate(
        teacher,
        teacher.encode_prompts(prompts),
        trailing_timesteps(25),
        seed=config.unet.loop.seed,
        batch_size=32,
        uncond=teacher.unconditional(1),
        guidance_scale=3.0,
    )
    return captioned_grid([to_pil(image) for batch in batches for image in batch], prompts)


def write_checksums(folder: Path) -> None:
    """``sha256.json``: relative path -> sha256 of every file of the folder but itself."""
    beside = ("sha256.json", "README.md", "training_curve.png", "training_curve.csv")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in beside)
    sums = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / "sha256.json").write_text(json.dumps(sums, indent=2) + "\n")
