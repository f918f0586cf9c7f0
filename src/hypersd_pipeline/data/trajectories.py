"""Pairs of noise and the clean latents that it leads to: made once, kept, and the targets of the regression term."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
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
    latents: LatentCache,
    teacher: TeacherConfig,
    pairs: NoisePairsConfig | None,
    start: LoRA | None,
    parts: Path,
    walk: Callable[[], None],
) -> Callable[[Path], None]:
    """A writer of the pairs. It writes nothing where none are needed (``pairs`` is None), or where they are there already.

    What another stage has made in a folder beside is copied: the unified LoRA and the one-step UNet start from the same model.

    Args:
        start: the LoRA of the ``distilled`` model.
        walk: makes all that is missing in ``parts`` (`walk_noise_pairs`). A walk that was interrupted goes on there.
    """
    return functools.partial(_write, latents=latents, teacher=teacher, config=pairs, start=start, parts=parts, walk=walk)


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


def _write(
    folder: Path,
    latents: LatentCache,
    teacher: TeacherConfig,
    config: NoisePairsConfig | None,
    start: LoRA | None,
    parts: Path,
    walk: Callable[[], None],
) -> None:
    if config is None:
        return
    model = load_teacher(teacher, parts=())
    latents.require_teacher(model)
    key, path = noise_pairs_key(config, latents, model, start), folder / FILE
    for made in (path, *sorted(folder.parent.glob(f"*/{FILE}"))):
        if made.is_file() and _key_of(made) == key:
            log.info("%s: made before", made)
            if made != path:
                with replacing_file(path) as temporary:
                    shutil.copyfile(made, temporary)
            shutil.rmtree(parts, ignore_errors=True)  # of a walk that was interrupted
            return
    walk()
    rows, noise = _drawn(latents, config)
    targets = [load_file(_part(parts, key, batch))["target"] for batch in _batches(config)]
    write_tensors(path, {"noise": noise, "target": torch.cat(targets), "rows": rows}, {"key": key})
    shutil.rmtree(parts)


@torch.no_grad()
def walk_noise_pairs(
    latents: LatentCache,
    teacher: TeacherConfig,
    config: NoisePairsConfig,
    start: LoRA | None,
    parts: Path,
    mine: Callable[[Sequence[range]], Sequence[range]],
) -> None:
    """Walk from the noise of the batches that ``parts`` does not have yet. Each batch's targets are a file there.

    Args:
        mine: which of the batches this process walks.
    """
    key = noise_pairs_key(config, latents, load_teacher(teacher, parts=()), start)
    missing = [batch for batch in mine(_batches(config)) if not _part(parts, key, batch).is_file()]
    if not missing:
        return
    model = load_teacher(teacher, parts=("backbone",))
    latents.require_teacher(model)
    if config.source == "distilled" and start is not None:
        merge_lora(model.backbone.module, start)
    if config.mixed_precision == "bf16":
        model.backbone.hold_in(torch.bfloat16)
    parts.mkdir(parents=True, exist_ok=True)
    data, (rows, noise), grid = latents.split("train"), _drawn(latents, config), model.process.trailing_timesteps(config.steps)
    for batch in missing:
        part, z = rows[batch.start : batch.stop], noise[batch.start : batch.stop]
        cond, denoiser = data.conditioning(part).to(model.device), model.denoiser().in_bf16(config.mixed_precision == "bf16")
        if config.source == "teacher" and config.guidance_scale != 1:
            denoiser = denoiser.guided(data.unconditional(len(part), cond.sizes).to(model.device), config.guidance_scale)
        target = sample_ddim(denoiser, z.to(model.device), cond, grid).float().cpu()
        write_tensors(_part(parts, key, batch), {"target": target})


def _drawn(latents: LatentCache, config: NoisePairsConfig) -> tuple[Tensor, Tensor]:
    """Rows int64 ``[n]`` and noise ``[n, c, h, w]`` of all pairs."""
    data, generator = latents.split("train"), torch.Generator().manual_seed(config.seed)
    rows = torch.randint(len(data), (config.count,), generator=generator)
    return rows, torch.randn(config.count, *data.latent_shape, generator=generator)


def _batches(config: NoisePairsConfig) -> list[range]:
    size = config.batch_size
    return [range(start, min(start + size, config.count)) for start in range(0, config.count, size)]


def _part(parts: Path, key: str, batch: range) -> Path:
    """Another key or batch size has files of its own."""
    return parts / f"{key[:16]}-{batch.start:08d}-{batch.stop:08d}.safetensors"
