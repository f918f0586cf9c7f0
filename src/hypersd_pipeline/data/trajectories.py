"""Pairs of noise and the clean latents that it leads to: made once, kept, and the targets of the regression term."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from hypersd_pipeline.config import Count, Guidance, Seed, Steps, Strict
from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.diffusion.sampling import sample_ddim
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import fingerprint, replacing_file, write_tensors
from hypersd_pipeline.models.lora import LoRA, lora_key, merge_lora
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher

log = logging.getLogger(__name__)

FILE = "pairs.safetensors"


class NoisePairsConfig(Strict):
    """Noise and the latents that it leads to.

    Attributes:
        source: whose walk: the ``teacher``'s with guidance (DMD's ODE pairs), or the ``distilled`` model's, in a tenth of the time.
        count: pairs, each with a caption of the training split. steps: of DDIM on the trailing grid.
        guidance_scale: of the teacher. batch_size, seed: of the walk.
        mixed_precision: ``bf16`` walks with the network in bf16 by autocast.
    """

    source: Literal["teacher", "distilled"] = "distilled"
    count: Count = 1500
    steps: Steps = 4
    guidance_scale: Guidance = 3.0
    batch_size: Count = 64
    seed: Seed = 0
    mixed_precision: Literal["no", "bf16"] = "no"

    later: ClassVar[frozenset[str]] = frozenset({"mixed_precision"})


@dataclass(frozen=True)
class NoisePairs:
    """``noise`` and ``target`` float32 ``[n, c, h, w]``, and the ``rows`` int64 ``[n]`` whose first captions were used."""

    noise: Tensor
    target: Tensor
    rows: Tensor


def make_noise_pairs(
    latents: LatentCache, teacher: TeacherConfig, pairs: NoisePairsConfig | None, start: LoRA | None = None
) -> Callable[[Path], None]:
    """A writer of the pairs. It writes nothing where none are needed (``pairs`` is None), or where they are there already.

    What another stage has made in a folder beside is copied: the unified LoRA and the one-step UNet start from the same model.

    Args:
        start: the LoRA of the ``distilled`` model.
    """
    return functools.partial(_write, latents=latents, teacher=teacher, config=pairs, start=start)


def noise_pairs_key(pairs: NoisePairsConfig, latents: LatentCache, model: Teacher, start: LoRA | None) -> str:
    """What pairs depend on."""
    teacher = [model.content_hash("backbone"), model.scheduler_config()]
    values = pairs.model_dump(exclude={"batch_size"} if pairs.mixed_precision != "no" else {"batch_size", "mixed_precision"})
    return fingerprint(values, latents.key, teacher, lora_key(start))


def read_noise_pairs(folder: Path, key: str) -> NoisePairs:
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
        return NoisePairs(*(file.get_tensor(name) for name in ("noise", "target", "rows")))


def _key_of(path: Path) -> str | None:
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("key")


@torch.no_grad()
def _write(folder: Path, latents: LatentCache, teacher: TeacherConfig, config: NoisePairsConfig | None, start: LoRA | None) -> None:
    if config is None:
        return
    model = load_teacher(teacher, parts=("backbone",))
    latents.require_teacher(model)
    key, path = noise_pairs_key(config, latents, model, start), folder / FILE
    for made in (path, *sorted(folder.parent.glob(f"*/{FILE}"))):
        if made.is_file() and _key_of(made) == key:
            log.info("%s: made before", made)
            if made != path:
                with replacing_file(path) as temporary:
                    shutil.copyfile(made, temporary)
            return
    if config.source == "distilled" and start is not None:
        merge_lora(model.backbone.module, start)
    if config.mixed_precision == "bf16":
        model.backbone.hold_in(torch.bfloat16)
    write_tensors(path, _walk(latents, model, config), {"key": key})


def _walk(latents: LatentCache, model: Teacher, config: NoisePairsConfig) -> dict[str, Tensor]:
    data, generator = latents.split("train"), torch.Generator().manual_seed(config.seed)
    rows = torch.randint(len(data), (config.count,), generator=generator)
    noise = torch.randn(config.count, *data.latent_shape, generator=generator)
    grid, targets = model.process.trailing_timesteps(config.steps), []
    for part, z in zip(rows.split(config.batch_size), noise.split(config.batch_size), strict=True):
        cond, denoiser = data.conditioning(part).to(model.device), model.denoiser().in_bf16(config.mixed_precision == "bf16")
        if config.source == "teacher" and config.guidance_scale != 1:
            denoiser = denoiser.guided(data.unconditional(len(part), cond.sizes).to(model.device), config.guidance_scale)
        targets.append(sample_ddim(denoiser, z.to(model.device), cond, grid).float().cpu())
    return {"noise": noise, "target": torch.cat(targets), "rows": rows}
