"""Building the cache of latents and text embeddings: shard by shard, resumable, each shard keyed by what it is made of."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.data.cache import CURE, MEANING, LatentCache, shard_key
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.images import decode_image, fit
from hypersd_pipeline.data.rows import Manifest, Row, sha256_of, share_of
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.teacher import Teacher

log = logging.getLogger(__name__)

FORMAT = "1"  # goes into every key: raise it when the meaning of a shard changes


def cache_parts(manifest: Manifest, config: DataConfig, teacher: Teacher) -> dict[str, str]:
    """Everything that the content of a cache depends on; its key is the sha256 of this."""
    return {
        "rows": manifest.key,
        "vae": teacher.content_hash("vae"),
        "text": teacher.content_hash("text"),
        "resolution": str(teacher.resolution),
        "vae_dtype": teacher.config.vae_dtype,
        "encoder_dtype": teacher.config.dtype,
        "dtype": config.dtype,
        "text_dtype": config.text_dtype,
        "max_images": str(config.max_images),
        "max_captions": str(config.max_captions),
        "format": FORMAT,
    }


def build_cache(path: Path, manifest: Manifest, config: DataConfig, teacher: Teacher) -> None:
    """Write the cache of a manifest; finished shards of an interrupted build, or of an older cache, are kept where they still hold.

    Args:
        teacher: with the parts ``vae`` and ``text``.

    Raises:
        UserError: an image changed after it was validated, or the VAE gives no finite latents.
    """
    parts = cache_parts(manifest, config, teacher)
    if not _up_to_date(path, parts):
        path.mkdir(parents=True, exist_ok=True)
        _Build(path, manifest, config, teacher, parts).run()


def _up_to_date(path: Path, parts: dict[str, str]) -> bool:
    """Whether there is nothing to do; otherwise the old index is removed, because from then on the folder may hold shards of both."""
    if not (path / "index.json").exists():
        return False
    try:
        old = LatentCache(path)
        changed = [MEANING[name] for name in MEANING if old.parts.get(name) != parts[name]]
        if not changed and old.check_shards():
            log.info("%s: up to date", path)
            return True
        log.info("%s: replacing a stale cache (changed: %s)", path, ", ".join(changed) or "its files")
    except UserError as error:
        log.info("%s: replacing a damaged cache (%s)", path, error)
    (path / "index.json").unlink()
    return False


@dataclass(frozen=True)
class _Shard:
    """A file to be. Its key is the sha256 of its rows and of what encodes them, so that a finished one is recognised."""

    name: str
    rows: int
    key: str
    make: Callable[[], dict[str, Tensor]]

    def entry(self) -> dict[str, Any]:
        return {"file": self.name, "rows": self.rows, "key": self.key}


class _Build:
    """One build: the plan of shards, and the encoders that fill them."""

    def __init__(self, path: Path, manifest: Manifest, config: DataConfig, teacher: Teacher, parts: dict[str, str]) -> None:
        self.path, self.manifest, self.config, self.teacher, self.parts = path, manifest, config, teacher, parts
        self.splits = {name: select_rows(rows, config) for name, rows in manifest.splits.items()}
        self.captions = list(dict.fromkeys(c for rows in self.splits.values() for row in rows for c in row.captions))
        self.number_of = {caption: number for number, caption in enumerate(self.captions)}

    def run(self) -> None:
        """Write what is missing, and the index last."""
        latents = {name: list(self._latent_shards(name, rows)) for name, rows in self.splits.items()}
        text = list(self._text_shards())
        plan = [shard for shards in latents.values() for shard in shards] + text
        for number, shard in enumerate(plan, 1):
            self._write(shard, f"{number}/{len(plan)}")
        self._write_unconditional()
        self._write_json("captions.json", self.captions)
        index = {
            "key": sha256_of(self.parts),
            "parts": self.parts,
            "latent_shape": [self.teacher.latent_channels, self.teacher.latent_size, self.teacher.latent_size],
            "splits": {name: [shard.entry() for shard in shards] for name, shards in latents.items()},
            "text": [shard.entry() for shard in text],
        }
        self._write_json("index.json", index)
        _remove_strangers(self.path, {shard.name for shard in plan})
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in self.splits.items())
        log.info("%s: %s; %d distinct captions", self.path, counts, len(self.captions))

    def _latent_shards(self, split: str, rows: list[Row]) -> Iterator[_Shard]:
        recipe = {name: self.parts[name] for name in ("vae", "vae_dtype", "resolution", "dtype", "format")} | {
            "layout": self.teacher.layout
        }
        for i, chunk in enumerate(_chunks(rows, self.config.shard_rows)):
            numbers = [[self.number_of[caption] for caption in row.captions] for row in chunk]
            key = sha256_of([recipe, [row.digest() for row in chunk], numbers])
            yield _Shard(f"{split}-{i:05d}.safetensors", len(chunk), key, partial(self._encode_rows, chunk, numbers))

    def _text_shards(self) -> Iterator[_Shard]:
        recipe = {name: self.parts[name] for name in ("text", "encoder_dtype", "text_dtype", "format")}
        for i, chunk in enumerate(_chunks(self.captions, self.config.shard_rows)):
            yield _Shard(f"text-{i:05d}.safetensors", len(chunk), sha256_of([recipe, list(chunk)]), partial(self._encode_captions, chunk))

    @torch.inference_mode()
    def _encode_rows(self, rows: Sequence[Row], numbers: list[list[int]]) -> dict[str, Tensor]:
        """Posterior mean and std ``[n, C, h, w]`` in the cache's dtype, captions as numbers; for SDXL ``time_ids`` float32 ``[n, 6]``."""
        dtype, side = getattr(torch, self.config.dtype), self.teacher.resolution
        means, stds, time_ids = [], [], []
        with ThreadPoolExecutor(self.config.workers) as pool:
            for batch in _chunks(rows, self.config.batch_size):
                pixels, crops = zip(*pool.map(self._read, batch), strict=True)
                mean, std = self.teacher.encode_images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1)
                means.append(mean.to("cpu", dtype))
                stds.append(std.to("cpu", dtype))
                # SDXL's size conditioning: original (height, width), crop (top, left), target (height, width)
                time_ids += [(row.height, row.width, *crop, side, side) for row, crop in zip(batch, crops, strict=True)]
        tensors = {"mean": torch.cat(means), "std": torch.cat(stds)}
        _check_finite(tensors, rows)
        tensors["captions"] = torch.tensor([number for some in numbers for number in some])
        tensors["caption_offsets"] = torch.from_numpy(np.cumsum([0, *map(len, numbers)]))
        return tensors | ({"time_ids": torch.tensor(time_ids, dtype=torch.float32)} if self.teacher.layout == "sdxl" else {})

    def _read(self, row: Row) -> tuple[np.ndarray, tuple[int, int]]:
        path = self.manifest.path(row)
        content = path.read_bytes() if path.exists() else b""
        if sha256(content).hexdigest() != row.sha256:
            raise UserError(f"{path} has changed or gone since it was validated; {CURE}.")
        return fit(decode_image(content), self.teacher.resolution)

    @torch.inference_mode()
    def _encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return self._stored(self.teacher.encode_prompts(captions))  # batched there; a single call, so that one warning counts cut captions

    def _stored(self, cond: Conditioning) -> dict[str, Tensor]:
        tensors = {"prompt_embeds": cond.prompt_embeds, "pooled": cond.pooled}
        return {name: x.to("cpu", getattr(torch, self.config.text_dtype)) for name, x in tensors.items() if x is not None}

    def _write(self, shard: _Shard, progress: str) -> None:
        try:
            kept = shard_key(self.path / shard.name) == shard.key
        except UserError:
            kept = False  # missing or damaged
        if kept:
            log.info("%s (%s): kept", shard.name, progress)
            return
        self._write_tensors(shard.name, shard.make(), shard.key)
        log.info("%s (%s): %d rows", shard.name, progress, shard.rows)

    @torch.inference_mode()
    def _write_unconditional(self) -> None:
        cond = self.teacher.unconditional(1)
        sizes = {} if cond.time_ids is None else {"time_ids": cond.time_ids.to("cpu", torch.float32)}
        self._write_tensors("unconditional.safetensors", self._stored(cond) | sizes, self.parts["text"])

    def _write_tensors(self, name: str, tensors: dict[str, Tensor], key: str) -> None:
        part = self.path / f"{name}.part"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"key": key})
        part.chmod(0o644)  # safetensors makes it private, and a cache is shared
        os.replace(part, self.path / name)  # a reader, or the next build, sees the whole file or none

    def _write_json(self, name: str, content: Any) -> None:
        part = self.path / f"{name}.part"
        part.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.path / name)


def select_rows(rows: Sequence[Row], config: DataConfig) -> list[Row]:
    """``max_images`` rows by hash, in their old order, each with ``max_captions`` captions."""
    chosen = set(sorted((row.image_id for row in rows), key=share_of)[: config.max_images])
    return [replace(row, captions=row.captions[: config.max_captions]) for row in rows if row.image_id in chosen]


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _check_finite(tensors: dict[str, Tensor], rows: Sequence[Row]) -> None:
    finite = tensors["mean"].flatten(1).isfinite().all(1) & tensors["std"].flatten(1).isfinite().all(1)
    if not finite.all():
        first = rows[int((~finite).nonzero()[0])].file
        raise UserError(
            f"{first}: the VAE gives latents that are not finite; set teacher.vae_dtype and data.dtype to float32 (SDXL's VAE needs it)."
        )


def _remove_strangers(path: Path, names: set[str]) -> None:
    for file in [*path.glob("*.safetensors"), *path.glob("*.part")]:
        if file.name not in names | {"unconditional.safetensors"}:
            file.unlink()
