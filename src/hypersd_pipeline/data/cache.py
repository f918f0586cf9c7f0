"""Reading the cache of latents and text embeddings: sharded safetensors, memory-mapped, keyed by what they were made of.

A folder holds ``<split>-00000.safetensors`` (posterior mean and std, caption numbers), ``text-00000.safetensors`` (one embedding per
distinct caption), ``unconditional.safetensors``, ``captions.json`` and, written last, ``index.json``: without it a cache is unfinished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError

if TYPE_CHECKING:
    from hypersd_pipeline.models.teacher import Teacher

CURE = "run data_prep again (kedro run --pipelines data_prep)"
MEANING = {
    "rows": "the data set",
    "vae": "the teacher's VAE",
    "text": "the teacher's text encoder",
    "resolution": "the resolution",
    "vae_dtype": "teacher.vae_dtype",
    "encoder_dtype": "teacher.dtype",
    "dtype": "data.dtype",
    "text_dtype": "data.text_dtype",
    "max_images": "data.max_images",
    "max_captions": "data.max_captions",
    "format": "the cache format",
}


def open_shard(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {CURE}.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); {CURE}.") from None


def shard_key(file: Path) -> str | None:
    return (open_shard(file).metadata() or {}).get("key")


class _Shards:
    """Rows that lie in several files: opened when first needed, mapped into memory, gathered by row number."""

    def __init__(self, path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
        self.path, self.entries = path, entries
        self.starts = torch.tensor(list(np.cumsum([0, *(e["rows"] for e in entries)])), dtype=torch.int64)
        self._opened: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of one file: memory-mapped, so that only rows that are used are read."""
        if number not in self._opened:
            entry = self.entries[number]
            file = open_shard(self.path / entry["file"])
            if (file.metadata() or {}).get("key") != entry["key"]:
                raise UserError(f"{self.path / entry['file']} does not belong to this cache; {CURE}.")
            self._opened[number] = {name: file.get_tensor(name) for name in file.keys()}
        return self._opened[number]

    def locate(self, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Per file that holds some of ``rows``: its number, the positions in ``rows``, and the row numbers in the file."""
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(self)):
            raise IndexError(f"rows {int(rows.min())}..{int(rows.max())} of {len(self)}")
        numbers = torch.searchsorted(self.starts, rows, right=True) - 1
        for number in numbers.unique().tolist():
            positions = (numbers == number).nonzero().flatten()
            yield number, positions, rows[positions] - self.starts[number]

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """``tensor[rows]`` over all files, in the order of ``rows``, float32."""
        found = [(positions, self.tensors(n)[name][local].float()) for n, positions, local in self.locate(rows)]
        if not found:
            return torch.empty(0, *self.tensors(0)[name].shape[1:])
        out = torch.empty(len(rows), *found[0][1].shape[1:])
        for positions, values in found:
            out[positions] = values
        return out


class SplitCache:
    """One split of a cache; row numbers are those of the manifest's split, after ``max_images``."""

    def __init__(self, cache: LatentCache, name: str) -> None:
        self.name, self._cache = name, cache
        self._shards = _Shards(cache.path, cache.index["splits"][name])

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)``."""
        c, h, w = self._cache.index["latent_shape"]
        return c, h, w

    def sample(self, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        """A draw from each row's posterior, ``mean + std * randn``; the mean itself where ``generator`` is None.

        Args:
            indices: int64 ``[b]``. generator: on the CPU.

        Returns:
            scaled latents, float32 ``[b, C, h, w]``, on the CPU.
        """
        mean = self._shards.gather("mean", indices)
        if generator is None:
            return mean
        return mean + self._shards.gather("std", indices) * torch.randn(mean.shape, generator=generator)

    def caption_numbers(self, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One caption per row, as a number into the distinct captions, int64 ``[b]``: the first, or one drawn by ``generator``."""
        draws = torch.zeros(len(indices)) if generator is None else torch.rand(len(indices), generator=generator)
        numbers = torch.empty(len(indices), dtype=torch.int64)
        for shard, positions, rows in self._shards.locate(indices):
            tensors = self._shards.tensors(shard)
            start, stop = tensors["caption_offsets"][rows], tensors["caption_offsets"][rows + 1]
            numbers[positions] = tensors["captions"][start + (draws[positions] * (stop - start)).long()]
        return numbers

    def conditioning(self, indices: Tensor, generator: torch.Generator | None = None) -> Conditioning:
        """Text conditioning of the rows, float32 on the CPU, with each image's own ``time_ids`` where the teacher is SDXL.

        Args:
            indices: int64 ``[b]``. generator: draws one of an image's captions; None takes the first.
        """
        cond = self._cache.text(self.caption_numbers(indices, generator))
        if cond.pooled is None:
            return cond
        return Conditioning(cond.prompt_embeds, cond.pooled, self._shards.gather("time_ids", indices))

    def captions(self, indices: Tensor, generator: torch.Generator | None = None) -> list[str]:
        """The captions that :meth:`conditioning` uses for the same ``indices`` and the same state of ``generator``."""
        return [self._cache.captions[number] for number in self.caption_numbers(indices, generator).tolist()]

    def unconditional(self, n: int, time_ids: Tensor | None = None) -> Conditioning:
        """As :meth:`LatentCache.unconditional`."""
        return self._cache.unconditional(n, time_ids)


class LatentCache:
    """A finished cache, opened for reading.

    Attributes:
        path: its folder. key: sha256 of ``parts``, which say what it was made of (see :func:`cache_parts`). splits: names of the splits.

    Raises:
        UserError: the cache is missing, unfinished or damaged, or was made of something else than ``expect`` says.
    """

    def __init__(self, path: Path | str, expect: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        try:
            self.index: dict[str, Any] = json.loads((self.path / "index.json").read_text(encoding="utf-8"))
            self.captions: list[str] = json.loads((self.path / "captions.json").read_text(encoding="utf-8"))
            self.key, self.parts, self.splits = str(self.index["key"]), dict(self.index["parts"]), list(self.index["splits"])
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing, the cache is not there or not finished; {CURE}.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: the cache's index is damaged ({error}); {CURE}.") from None
        self._text = _Shards(self.path, self.index["text"])
        self._split_caches: dict[str, SplitCache] = {}
        self._unconditional: Conditioning | None = None
        self.require(**(expect or {}))

    def require(self, **expected: str) -> None:
        """Refuse to serve a cache made of something else.

        Args:
            expected: ``key``, or any of ``parts``, such as ``vae=teacher.content_hash("vae")``.

        Raises:
            UserError: names what differs, both values and the cure.
        """
        for part, value in expected.items():
            found = self.key if part == "key" else self.parts.get(part)
            if found != value:
                what = f"{MEANING[part]} has" if part in MEANING else f"the {part} is"
                raise UserError(f"{self.path} is stale: {what} {str(value)[:16]} now, the cache was made with {str(found)[:16]}; {CURE}.")

    def require_teacher(self, teacher: Teacher) -> None:
        """:meth:`require` that the cache was made by this teacher's encoders, at its resolution; the parts need not be loaded."""
        self.require(vae=teacher.content_hash("vae"), text=teacher.content_hash("text"), resolution=str(teacher.resolution))

    def check_shards(self) -> bool:
        """Whether all files are there, can be opened and belong to this cache."""
        entries = [*self.index["text"], *(e for shards in self.index["splits"].values() for e in shards)]
        open_shard(self.path / "unconditional.safetensors")
        return all(shard_key(self.path / entry["file"]) == entry["key"] for entry in entries)

    def split(self, name: str) -> SplitCache:
        """One split.

        Raises:
            UserError: the cache has no such split.
        """
        if name not in self.splits:
            raise UserError(f"{self.path} has no split {name!r} but {self.splits}; check data.source.splits and {CURE}.")
        if name not in self._split_caches:
            self._split_caches[name] = SplitCache(self, name)
        return self._split_caches[name]

    def text(self, numbers: Tensor) -> Conditioning:
        """Embeddings of distinct captions by number, int64 ``[b]``; float32, without ``time_ids``."""
        names = self._text.tensors(0)
        return Conditioning(
            self._text.gather("prompt_embeds", numbers), self._text.gather("pooled", numbers) if "pooled" in names else None
        )

    def unconditional(self, n: int, time_ids: Tensor | None = None) -> Conditioning:
        """The unconditional half of guidance, ``n`` times, float32, without copying.

        Args:
            time_ids: SDXL's ``[n, 6]`` of the conditional half, which both halves must share; the default sizes if not given.
        """
        if self._unconditional is None:
            file = open_shard(self.path / "unconditional.safetensors")
            parts = {name: file.get_tensor(name).float() for name in file.keys()}
            self._unconditional = Conditioning(parts["prompt_embeds"], parts.get("pooled"), parts.get("time_ids"))
        cond = self._unconditional.expand(n)
        return cond if cond.time_ids is None or time_ids is None else Conditioning(cond.prompt_embeds, cond.pooled, time_ids)
