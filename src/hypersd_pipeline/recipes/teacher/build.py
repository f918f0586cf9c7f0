"""From a generated data set to the files that ship: a diffusers folder, the dual encoder and the image-quality head."""

from __future__ import annotations

import functools
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
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.sampling import generate
from hypersd_pipeline.files import file_sha256
from hypersd_pipeline.metrics.grids import captioned_grid, to_pil
from hypersd_pipeline.models.dual_encoder import DualEncoder, save_dual_encoder
from hypersd_pipeline.models.quality_head import QualityHead, save_quality_head
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.recipes.teacher.config import TeacherTrainingConfig
from hypersd_pipeline.recipes.teacher.encoders import retrieval_at_1, train_dual_encoder, train_quality_head
from hypersd_pipeline.recipes.teacher.unet import SCHEDULER_CONFIG, TextToLatent, train_denoiser
from hypersd_pipeline.recipes.teacher.vae import encode_all, to_unit_range, train_decoder, train_vae
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.loop import MetricSink

# --- the data set ------------------------------------------------------------------------------------------------------------------------


def generate_scenes(config: TeacherTrainingConfig) -> Callable[[Path], None]:
    """A writer of the data set that the teacher is trained on."""
    return functools.partial(twemoji.write_dataset, config=config.data)


def read_captioned_images(dataset: Path, split: str, limit: int | None = None) -> tuple[Tensor, list[str]]:
    """Images and first captions of one split of a COCO-format folder whose images have one size, in the file's order.

    Args:
        limit: so many images at most, the first ones.

    Returns:
        uint8 ``[n, h, w, 3]``, and ``n`` captions.

    Raises:
        UserError: the annotation file is missing or has no captioned image.
    """
    path = dataset / "annotations" / f"captions_{split}.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; generate the data set first with 'kedro run --pipelines teacher'.")
    content = json.loads(path.read_text())
    caption: dict[int, str] = {}
    for row in content["annotations"]:
        caption.setdefault(row["image_id"], row["caption"])
    rows = [row for row in content["images"] if row["id"] in caption][:limit]
    if not rows:
        raise UserError(f"{path}: has no captioned image; generate the data set again.")
    pixels = np.stack([np.asarray(Image.open(dataset / split / row["file_name"], formats=["PNG"]).convert("RGB")) for row in rows])
    return torch.from_numpy(pixels), [caption[row["id"]] for row in rows]


def _channels_first(images: Tensor) -> Tensor:
    """``[n, h, w, 3]`` to ``[n, 3, h, w]``."""
    return images.permute(0, 3, 1, 2)


def _data_key(config: TeacherTrainingConfig) -> str:
    """Names the train split in the keys of checkpoints."""
    return json.dumps(config.data.model_dump(), sort_keys=True)


# --- what is trained on it ---------------------------------------------------------------------------------------------------------------


def vae_from_scenes(dataset: Path, config: TeacherTrainingConfig, checkpoints: CheckpointStore, metric_stream: MetricSink) -> Any:
    """The autoencoder, trained on the train split: see `train_vae`."""
    images, _ = read_captioned_images(dataset, "train")
    return train_vae(images, config.vae, _data_key(config), checkpoints, metric_stream)


def latents_from_scenes(dataset: Path, vae: Any) -> tuple[Tensor, Tensor]:
    """Posterior mean and std of the train split, two float32 ``[n, c, h, w]``, on which decoder and denoiser are trained."""
    return encode_all(vae, read_captioned_images(dataset, "train")[0])


def decoder_from_scenes(
    dataset: Path,
    vae: Any,
    latents: tuple[Tensor, Tensor],
    config: TeacherTrainingConfig,
    checkpoints: CheckpointStore,
    metric_stream: MetricSink,
) -> Any:
    """The autoencoder with its decoder trained on, the latents being what they are: see `train_decoder`."""
    images, _ = read_captioned_images(dataset, "train")
    return train_decoder(vae, images, latents, config.vae, _data_key(config), checkpoints, metric_stream)


def denoiser_from_scenes(
    dataset: Path,
    latents: tuple[Tensor, Tensor],
    config: TeacherTrainingConfig,
    checkpoints: CheckpointStore,
    metric_stream: MetricSink,
) -> TextToLatent:
    """The denoiser and its text encoder, trained on the train split: see `train_denoiser`."""
    captions = read_captioned_images(dataset, "train")[1]
    key = _data_key(config) + json.dumps(config.vae.identity(), sort_keys=True)
    return train_denoiser(latents, captions, config.unet, key, checkpoints, metric_stream)


def dual_encoder_from_scenes(
    dataset: Path, config: TeacherTrainingConfig, checkpoints: CheckpointStore, metric_stream: MetricSink
) -> tuple[DualEncoder, dict[str, Any]]:
    """The dual encoder, trained on ``encoder_images`` of the train split: see `train_dual_encoder`.

    Returns:
        The encoder, and ``dual_encoder_loss`` and text-to-image R@1 on 500 images of the test and unseen splits
        (``dual_encoder_r_at_1_<split>``, with their number as ``..._n``).
    """
    images, captions = read_captioned_images(dataset, "train", config.encoder_images)
    metrics: dict[str, Any]
    encoder, metrics = train_dual_encoder(
        _channels_first(images), captions, config.dual_encoder, _encoder_data_key(config), checkpoints, metric_stream
    )
    for split in ("test", "test_unseen"):
        images, captions = read_captioned_images(dataset, split, 500)
        metrics[f"dual_encoder_r_at_1_{split}"] = retrieval_at_1(encoder, _channels_first(images), captions)
        metrics[f"dual_encoder_r_at_1_{split}_n"] = len(captions)
    return encoder, metrics


def quality_head_from_scenes(
    dataset: Path, encoder: DualEncoder, config: TeacherTrainingConfig, checkpoints: CheckpointStore, metric_stream: MetricSink
) -> tuple[QualityHead, dict[str, Any]]:
    """The image-quality head, and its accuracy on held-out clean-against-degraded pairs: see `train_quality_head`."""
    images, _ = read_captioned_images(dataset, "train", config.encoder_images)
    return train_quality_head(_channels_first(images), encoder, config.quality_head, _encoder_data_key(config), checkpoints, metric_stream)


def _encoder_data_key(config: TeacherTrainingConfig) -> str:
    return json.dumps([_data_key(config), config.encoder_images])


# --- what is measured and written --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_vae(dataset: Path, vae: Any) -> dict[str, Any]:
    """Reconstruction on the test and unseen splits: mean over images of the peak signal-to-noise ratio, in dB for pixels in [0, 255]."""
    metrics: dict[str, Any] = {}
    for split in ("test", "test_unseen"):
        images, _ = read_captioned_images(dataset, split)
        errors = []
        for batch in images.split(64):
            pixels = to_unit_range(batch)
            restored = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
            errors.append((restored - pixels).square().mean(dim=(1, 2, 3)) / 4)
        psnr = -10 * torch.log10(torch.cat(errors))
        metrics[f"vae_psnr_{split}"] = float(psnr.mean())
        metrics[f"vae_psnr_{split}_n"] = len(psnr)
    return metrics


def export_encoders(
    encoder: DualEncoder, head: QualityHead, encoder_metrics: dict[str, Any], head_metrics: dict[str, Any], config: TeacherTrainingConfig
) -> Callable[[Path], None]:
    """A writer of ``dual_encoder.safetensors`` and ``quality_head.safetensors``, each with its recipe."""

    def write(folder: Path) -> None:
        data = config.data.model_dump()
        save_dual_encoder(
            encoder,
            folder / "dual_encoder.safetensors",
            {"data": data, "training": config.dual_encoder.model_dump(mode="json"), **encoder_metrics},
        )
        save_quality_head(
            head,
            encoder,
            folder / "quality_head.safetensors",
            {"data": data, "training": config.quality_head.model_dump(mode="json"), **head_metrics},
        )

    return write


def export_teacher(vae: Any, denoiser: TextToLatent, metrics: dict[str, Any], config: TeacherTrainingConfig) -> Callable[[Path], None]:
    """A writer of the diffusers folder: fp16 safetensors, recipe and sha256 of every file."""
    return functools.partial(_write_teacher, vae=vae, denoiser=denoiser, metrics=metrics, config=config)


def _write_teacher(folder: Path, *, vae: Any, denoiser: TextToLatent, metrics: dict[str, Any], config: TeacherTrainingConfig) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    denoiser.tokenizer.backend_tokenizer.no_truncation()  # left over from the training's own calls
    denoiser.tokenizer.backend_tokenizer.no_padding()
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=denoiser.text_encoder.half(),
        tokenizer=denoiser.tokenizer,
        unet=denoiser.unet.half(),
        scheduler=DDIMScheduler(**SCHEDULER_CONFIG),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    # stored in fp16 for its size, opened in float32 like the UNet: transformers obeys the config's dtype, diffusers has none there
    text_config = folder / "text_encoder" / "config.json"
    text_config.write_text(json.dumps({**json.loads(text_config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    (folder / "recipe.json").write_text(json.dumps({"config": config.model_dump(mode="json"), "figures": metrics}, indent=2) + "\n")
    write_checksums(folder)


def sample_teacher(folder: Path, dataset: Path, config: TeacherTrainingConfig) -> Image.Image:
    """The first 32 test captions, each sampled once: 25 DDIM steps, guidance scale 3, noise by ``unet.loop.seed``."""
    teacher = load_teacher(TeacherConfig(source=str(folder)))
    _, captions = read_captioned_images(dataset, "test")
    prompts = captions[:32]
    batches = generate(
        teacher,
        teacher.encode_prompts(prompts),
        trailing_timesteps(25),
        seed=config.unet.loop.seed,
        batch_size=32,
        denoiser=teacher.denoiser().guided(teacher.unconditional(1), 3.0),
    )
    return captioned_grid([to_pil(image) for batch in batches for image in batch], prompts)


def write_checksums(folder: Path) -> None:
    """``sha256.json``: relative path -> sha256 of every file of the folder but itself, the README and the training's curve."""
    beside = ("sha256.json", "README.md", "training_curve.png", "training_curve.csv")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in beside)
    sums = {p.relative_to(folder).as_posix(): file_sha256(p) for p in files}
    (folder / "sha256.json").write_text(json.dumps(sums, indent=2) + "\n")
