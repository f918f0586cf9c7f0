"""Pairs of noise and the clean latents it leads to."""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.diffusion.grids import trailing_timesteps
from hypersd_pipeline.diffusion.sampling import sample_ddim
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.lora import LoRA, lora_key, merge_lora
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.pipelines.dmd.config import OneStepConfig, PairsConfig
from hypersd_pipeline.training.checkpoints import fingerprint

log = logging.getLogger(__name__)

FILE = "pairs.safetensors"


@dataclass(frozen=True)
class Pairs:
    """``noise`` and ``target`` float32 ``[n, c, h, w]``, and the ``rows`` int64 ``[n]`` whose first captions were used."""

    noise: Tensor
    target: Tensor
    rows: Tensor


def make_pairs(latents: LatentCache, teacher: TeacherConfig, stage: OneStepConfig, start: LoRA | None = None) -> Callable[[Path], None]:
    """A writer of the stage's pairs; it writes nothing where they are not needed, or are there already.

    What another stage has made in a folder beside is copied: the unified LoRA and the one-step UNet start from the same model.
    """
    return functools.partial(_write, latents=latents, teacher=teacher, stage=stage, start=start)


def pairs_key(pairs: PairsConfig, latents: LatentCache, model: Teacher, start: LoRA | None) -> str:
    """What pairs depend on."""
    teacher = [model.content_hash("unet"), model.prediction_type, model.scheduler_config()]
    return fingerprint(pairs.model_dump(exclude={"batch_size"}), latents.key, teacher, lora_key(start))


def read_pairs(folder: Path, key: str) -> Pairs:
    """The pairs of a folder.

    Raises:
        UserError: they are missing, or were made with something else.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{path} is missing; run the stage's whole pipeline, which makes it.")
    if _key_of(path) != key:
        raise UserError(f"{path} was made with another model or other settings; run the stage's whole pipeline, which makes it anew.")
    with safe_open(path, framework="pt") as file:
        return Pairs(*(file.get_tensor(name) for name in ("noise", "target", "rows")))


def _key_of(path: Path) -> str | None:
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("key")


@torch.no_grad()
def _write(folder: Path, latents: LatentCache, teacher: TeacherConfig, stage: OneStepConfig, start: LoRA | None) -> None:
    if not stage.needs_pairs:
        return
    config = stage.pairs
    model = load_teacher(teacher, parts=("unet",))
    latents.require_teacher(model)
    stage.check_schedule(model.schedule)
    key, path = pairs_key(config, latents, model, start), folder / FILE
    half_written = path.with_suffix(".tmp")
    for made in (path, *sorted(folder.parent.glob(f"*/{FILE}"))):
        if made.is_file() and _key_of(made) == key:
            log.info("%s: made before", made)
            if made != path:
                shutil.copyfile(made, half_written)
                os.replace(half_written, path)
            return
    if config.source == "distilled" and start is not None:
        merge_lora(model.unet, start)
    data, generator = latents.split("train"), torch.Generator().manual_seed(config.seed)
    rows = torch.randint(len(data), (config.count,), generator=generator)
    noise = torch.randn(config.count, *data.latent_shape, generator=generator)
    scale = config.guidance_scale if config.source == "teacher" else 1.0
    grid, targets = trailing_timesteps(config.steps, model.schedule.num_train_timesteps), []
    for part, z in zip(rows.split(config.batch_size), noise.split(config.batch_size), strict=True):
        cond = data.conditioning(part).to(model.device)
        uncond = data.unconditional(len(part), cond.time_ids).to(model.device)
        walk = sample_ddim(
            model.denoiser(), z.to(model.device), cond, grid, model.schedule, model.prediction_type, uncond=uncond, guidance_scale=scale
        )
        targets.append(walk.float().cpu())
    save_file({"noise": noise, "target": torch.cat(targets), "rows": rows}, half_written, metadata={"key": key})
    os.replace(half_written, path)
