"""Reading the cache of latents and text embeddings: sharded safetensors, memory-mapped, keyed by what they were made of.

A folder holds ``<split>-<key>.safetensors`` (posterior mean and std of up to ``shard_rows`` images), ``text-<key>.safetensors`` (embeddings
of as many distinct captions), ``rows.safetensors`` (the caption numbers of each row, and with buckets its bucket and its place in the
shards, each of which has rows of one bucket), ``unconditional.safetensors``, ``captions.json``,
``encoders.json`` (what the encoders gave for a fixed image and prompt) and, written last, ``index.json``: without it a cache is unfinished.

A shard says itself what is in it: the key of each row, and a checksum. A reader compares the checksum when it opens a shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.data.lines import Lines
from hypersd_pipeline.draws import rand, randn
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import file_sha256, write_tensors

if TYPE_CHECKING:
    from hypersd_pipeline.models.teacher import Teacher

FORMAT = "3"  # goes into every key: raise it when the meaning of a shard changes
ROWS, UNCONDITIONAL, CAPTIONS, INDEX = "rows.safetensors", "unconditional.safetensors", "captions.json", "index.json"
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
    "sizes": "data.sizes",
    "buckets": "data.buckets",
    "encoders": "what the teacher's encoders give for a fixed image and prompt",
    "format": "the cache format",
}


@dataclass(frozen=True)
class Shard:
    """A file of the cache, as far as it describes itself.

    Attributes:
        file: its name. key: of its rows together. rows: the key of each row. sha256: of all of this and of the tensors.
    """

    file: str
    key: str
    rows: tuple[str, ...]
    sha256: str

    def entry(self) -> dict[str, Any]:
        """What the index says of it."""
        return {"file": self.file, "rows": len(self.rows), "key": self.key, "sha256": self.sha256}


def _digest(key: str, rows: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    head = [key, list(rows), [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]]
    digest = hashlib.sha256(json.dumps(head).encode())
    for name in names:
        content: Any = tensors[name].contiguous().flatten().view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def write_shard(path: Path, key: str, rows: Sequence[str], tensors: Mapping[str, Tensor]) -> Shard:
    """Write a file of the cache at once. The tensors are on the CPU."""
    shard = Shard(path.name, key, tuple(rows), _digest(key, rows, tensors))
    # one entry: safetensors writes several in random order, so the same content would be other bytes
    write_tensors(path, tensors, {"shard": json.dumps({"key": key, "rows": list(rows), "sha256": shard.sha256})})
    return shard


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Shard]]:
    """A file of the cache, and what it says of itself. Raises UserError where it is missing or cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {})["shard"])
            yield file, Shard(path.name, str(head["key"]), tuple(map(str, head["rows"])), str(head["sha256"]))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {CURE}.") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); {CURE}.") from None


def read_head(path: Path) -> Shard:
    """What a file of the cache says of itself. Its tensors are not read.

    Raises:
        UserError: it is missing, cut off, or no file of a cache.
    """
    with _opened(path) as (_, shard):
        return shard


def read_shard(path: Path) -> tuple[Shard, dict[str, Tensor]]:
    """A file of the cache, checked: its tensors are memory-mapped, and read once for the checksum.

    Raises:
        UserError: it is missing or damaged.
    """
    with _opened(path) as (file, shard):
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if _digest(shard.key, shard.rows, tensors) != shard.sha256:
        raise UserError(f"{path} is damaged (its checksum is another one); {CURE}.")
    return shard, tensors


def read_captions(path: Path) -> Sequence[str]:
    """The distinct captions, by number. They stay in the file, which is a JSON list with one caption a line."""
    return Lines(open(path, "rb"), lambda line: str(json.loads(line.strip().removesuffix(b","))), keep=lambda line: line.startswith(b' "'))


def _belonging(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the file that an entry of the index names. Raises UserError where it is damaged or another one."""
    shard, tensors = read_shard(path / entry["file"])
    if (shard.key, shard.sha256) != (entry["key"], entry["sha256"]):
        raise UserError(f"{path / entry['file']} does not belong to this cache; {CURE}.")
    return tensors


def check_numbers(rows: Tensor, count: int) -> None:
    """Raises IndexError for numbers of rows that there are not."""
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < count):
        raise IndexError(f"rows {int(rows.min())}..{int(rows.max())} of {count}")


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
            self._opened[number] = _belonging(self.path, self.entries[number])
        return self._opened[number]

    def locate(self, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Per file that holds some of ``rows``: its number, the positions in ``rows``, and the row numbers in the file."""
        check_numbers(rows, len(self))
        numbers = torch.searchsorted(self.starts, rows, right=True) - 1
        for number in numbers.unique().tolist():
            positions = (numbers == number).nonzero().flatten()
            yield number, positions, rows[positions] - self.starts[number]

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """``tensor[rows]`` over all files, in the order of ``rows``, float32."""
        found = [(positions, self.tensors(n)[name][local].float()) for n, positions, local in self.locate(rows)]
        if not found:
            return torch.empty(0, *self.tensors(0)[name].shape[1:])
        if len({values.shape[1:] for _, values in found}) > 1:
            raise ValueError("rows of several buckets have latents of different shapes")
        out = torch.empty(len(rows), *found[0][1].shape[1:])
        for positions, values in found:
            out[positions] = values
        return out


class SplitCache:
    """One split of a cache. Row numbers are those of the manifest's split, after ``max_images``."""

    def __init__(self, cache: LatentCache, name: str) -> None:
        self.name, self._cache = name, cache
        self._shards = _Shards(cache.path, cache.index["splits"][name])

    def __len__(self) -> int:
        return len(self._shards) if self.has_images else len(self._cache.row_tensors[f"{self.name}.caption_offsets"]) - 1

    @property
    def has_images(self) -> bool:
        """Whether there are latents. Prompts have none."""
        return bool(self._shards.entries)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)`` of a square."""
        c, h, w = self._cache.index["latent_shape"]
        return c, h, w

    @property
    def bucket_shapes(self) -> list[tuple[int, int, int]]:
        """``(C, h, w)`` of each bucket. Empty without buckets."""
        c, _, _ = self.latent_shape
        return [(c, h, w) for h, w in self._cache.index.get("bucket_shapes", [])] if self.has_images else []

    def alike(self, row: int) -> Tensor:
        """The rows whose latents have the shape of this one's, int64. All of them without buckets."""
        if not self.bucket_shapes:
            return torch.arange(len(self))
        buckets = self._cache.row_tensors[f"{self.name}.buckets"]
        return (buckets == buckets[row]).nonzero().flatten()

    def shape_of(self, row: int) -> tuple[int, int, int]:
        """``(C, h, w)`` of a row's latents."""
        shapes = self.bucket_shapes
        return shapes[int(self._cache.row_tensors[f"{self.name}.buckets"][row])] if shapes else self.latent_shape

    def _gather(self, name: str, indices: Tensor) -> Tensor:
        if self.bucket_shapes:
            check_numbers(indices, len(self))
            indices = self._cache.row_tensors[f"{self.name}.places"][indices]
        return self._shards.gather(name, indices)

    def sample(self, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        """A draw from each row's posterior, ``mean + std * randn``. The mean itself where ``generator`` is None.

        Args:
            indices: int64 ``[b]``. generator: on the CPU.

        Returns:
            scaled latents, float32 ``[b, C, h, w]``, on the CPU. With buckets all rows are of one, see `alike`.

        Raises:
            UserError: the data are prompts without images.
            ValueError: the rows are of several buckets.
        """
        if not self.has_images:
            raise UserError("data.source: prompts have no images, and this stage trains on images; use a source with images for it.")
        mean = self._gather("mean", indices)
        if generator is None:
            return mean
        return mean + self._gather("std", indices) * randn(mean.shape, generator)

    def caption_numbers(self, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One caption per row, as a number into the distinct captions, int64 ``[b]``: the first, or one drawn by ``generator``."""
        draws = torch.zeros(len(indices)) if generator is None else rand((len(indices),), generator)
        check_numbers(indices, len(self))
        offsets, numbers = (self._cache.row_tensors[f"{self.name}.{name}"] for name in ("caption_offsets", "captions"))
        start, stop = offsets[indices], offsets[indices + 1]
        return numbers[start + (draws * (stop - start)).long()]

    def conditioning(self, indices: Tensor, generator: torch.Generator | None = None) -> Conditioning:
        """Text conditioning of the rows, float32 on the CPU. Where the teacher is SDXL, with ``sizes`` as ``data.sizes`` says.

        Prompts without images have the default sizes of the unconditional half.

        Args:
            indices: int64 ``[b]``. generator: draws one of an image's captions. None takes the first.
        """
        cond = self._cache.text(self.caption_numbers(indices, generator))
        if cond.pooled is None:
            return cond
        told = not self.has_images or self._cache.parts.get("sizes", "image") == "default"
        if told and not self.bucket_shapes:
            return Conditioning(cond.prompt_embeds, cond.pooled, self.unconditional(len(indices)).sizes)
        sizes = self._gather("sizes", indices)
        if told:
            target = sizes[:, 4:]
            sizes = torch.cat([target, torch.zeros_like(target), target], dim=1)
        return Conditioning(cond.prompt_embeds, cond.pooled, sizes)

    def captions(self, indices: Tensor, generator: torch.Generator | None = None) -> list[str]:
        """The captions that :meth:`conditioning` uses for the same ``indices`` and the same state of ``generator``."""
        return [self._cache.captions[number] for number in self.caption_numbers(indices, generator).tolist()]

    def unconditional(self, n: int, sizes: Tensor | None = None) -> Conditioning:
        """As :meth:`LatentCache.unconditional`."""
        return self._cache.unconditional(n, sizes)


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
            self.index: dict[str, Any] = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
            self.key, self.parts, self.splits = str(self.index["key"]), dict(self.index["parts"]), list(self.index["splits"])
            if self.parts.get("format") != FORMAT:
                raise UserError(f"{self.path} was made by another version of this project; {CURE}.")
            if file_sha256(self.path / CAPTIONS) != self.index["captions"]:
                raise ValueError(f"{CAPTIONS} does not belong to it")
            self.captions = read_captions(self.path / CAPTIONS)
            self._text = _Shards(self.path, self.index["text"])
            self._others = {name: dict(self.index[name]) for name in ("rows", "unconditional")}
            self._split_caches = {name: SplitCache(self, name) for name in self.splits}
        except FileNotFoundError as error:
            raise UserError(f"{error.filename} is missing, the cache is not there or not finished; {CURE}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise UserError(f"{self.path}: the cache's index is damaged ({error}); {CURE}.") from None
        self._unconditional: Conditioning | None = None
        self.require(**(expect or {}))

    @cached_property
    def row_tensors(self) -> dict[str, Tensor]:
        """``<split>.captions`` and ``<split>.caption_offsets``: the numbers of each row's captions."""
        return _belonging(self.path, self._others["rows"])

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
        """:meth:`require` that the cache was made by this teacher's encoders, at its resolution. The parts need not be loaded."""
        self.require(vae=teacher.content_hash("vae"), text=teacher.content_hash("text"), resolution=str(teacher.resolution))

    def split(self, name: str) -> SplitCache:
        """One split.

        Raises:
            UserError: the cache has no such split.
        """
        if name not in self.splits:
            raise UserError(f"{self.path} has no split {name!r} but {self.splits}; check data.source.splits and {CURE}.")
        return self._split_caches[name]

    def text(self, numbers: Tensor) -> Conditioning:
        """Embeddings of distinct captions by number, int64 ``[b]``. float32, without ``sizes``."""
        names = self._text.tensors(0)
        return Conditioning(
            self._text.gather("prompt_embeds", numbers), self._text.gather("pooled", numbers) if "pooled" in names else None
        )

    def unconditional(self, n: int, sizes: Tensor | None = None) -> Conditioning:
        """The unconditional half of guidance, ``n`` times, float32, without copying.

        Args:
            sizes: SDXL's ``[n, 6]`` of the conditional half, which both halves must share. The default sizes if not given.
        """
        if self._unconditional is None:
            parts = {name: tensor.float() for name, tensor in _belonging(self.path, self._others["unconditional"]).items()}
            self._unconditional = Conditioning(parts["prompt_embeds"], parts.get("pooled"), parts.get("sizes"))
        cond = self._unconditional.expand(n)
        return cond if cond.sizes is None or sizes is None else Conditioning(cond.prompt_embeds, cond.pooled, sizes)
