"""Building the cache of latents and text embeddings: row by row, resumable, each row keyed by what it is made of.

A row that the folder has already, in whatever shard, is copied and not encoded again. So a new, moved or corrected row costs that row.

Several processes may fill one folder together. Each writes some shards of the same plan, and encodes the batches that these rows would be
in if there were one process. So the bytes do not depend on how many there are.
"""

from __future__ import annotations

import json
import logging
import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.data.buckets import Buckets, Size, nearest
from hypersd_pipeline.data.cache import (
    CAPTIONS,
    CURE,
    FORMAT,
    INDEX,
    MEANING,
    ROWS,
    UNCONDITIONAL,
    LatentCache,
    Shard,
    read_head,
    read_shard,
    write_shard,
)
from hypersd_pipeline.data.captions import DistinctCaptions
from hypersd_pipeline.data.config import DataConfig, PromptsSource
from hypersd_pipeline.data.images import decode_image, fit
from hypersd_pipeline.data.lines import Picked
from hypersd_pipeline.data.probe import probe
from hypersd_pipeline.data.reading import BadFile
from hypersd_pipeline.data.rows import Manifest, Row, share_of
from hypersd_pipeline.data.stored import read_packed, read_row
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import replacing_file, runs_elsewhere, sha256_of, write_text
from hypersd_pipeline.models.teacher import Teacher

log = logging.getLogger(__name__)

TEXT = "text"
T = TypeVar("T")
Fitted = tuple[np.ndarray, tuple[int, int]]  # pixels, and the crop's top and left: what `fit` gives
Encoded = dict[str, Tensor] | None  # a row's tensors. None: its image is broken
AHEAD = 2  # batches that are read before they are needed
KEY = 32  # hexadecimal digits of a row's key: 128 bits


def cache_parts(manifest: Manifest, config: DataConfig, teacher: Teacher, encoders: Mapping[str, str] | None = None) -> dict[str, str]:
    """Everything that the content of a cache depends on. Its key is the sha256 of this.

    Args:
        teacher: with the parts ``vae`` and ``text`` where ``encoders`` (see :func:`probe`) are not given.
    """
    encoders = encoders or probe(teacher)
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
        "encoders": f"{encoders['vae']}-{encoders['text']}",
        "format": FORMAT,
        **({"sizes": config.sizes} if teacher.layout == "sdxl" else {}),  # the rows hold their own sizes either way
        **({"buckets": config.buckets.model_dump_json()} if config.buckets else {}),
    }


def build_cache(path: Path, manifest: Manifest, config: DataConfig, teacher: Teacher, others: Callable[[], None] | None = None) -> None:
    """Write the cache of a manifest. Rows of an interrupted build, or of an older cache, are kept where they still hold.

    Whenever it is killed, the folder holds an older cache or an unfinished one, and the next call goes on from there.

    Args:
        teacher: with the parts ``vae`` and ``text``.
        others: called where something must be encoded. It may have other processes call `fill_cache`. What they leave out is made here.

    Raises:
        UserError: an image changed after it was validated, or an encoder gives nothing finite.
    """
    path.mkdir(parents=True, exist_ok=True)
    encoders = probe(teacher, path)
    _Build(path, manifest, config, teacher, encoders).run(others)


def fill_cache(
    path: Path,
    manifest: Manifest,
    config: DataConfig,
    teacher: Teacher,
    number: int,
    of: int,
    ready: Callable[[], None] = lambda: None,
    checked: bool = True,
) -> None:
    """Write the shards of one of several processes. `build_cache`, which has them started, makes a cache of all.

    Args:
        number: of this process, below ``of``, how many there are.
        ready: waits until all of them have looked at what is there. From then on they write.
        checked: all images were decoded before. Otherwise broken ones are left out here, and `broken_rows` names them.

    Raises:
        UserError: as `build_cache`.
    """
    path.mkdir(parents=True, exist_ok=True)
    build = _Build(path, manifest, config, teacher, probe(teacher, path), whole=False, checked=checked)
    ready()
    build.fill(number, of)


def is_full(path: Path, manifest: Manifest, config: DataConfig, teacher: Teacher) -> bool:
    """Whether the folder has the latents of all rows whose images can be decoded. The heads of its files tell."""
    path.mkdir(parents=True, exist_ok=True)
    return _Build(path, manifest, config, teacher, probe(teacher, path), whole=False).full()


def broken_rows(path: Path, manifest: Manifest, config: DataConfig, teacher: Teacher) -> list[tuple[str, int, str]]:
    """Split, number and reason of the rows that `fill_cache` has left out because their images cannot be decoded.

    Only images of which the folder has no latents are looked at.
    """
    return list(_Build(path, manifest, config, teacher, probe(teacher, path), whole=False).broken())


@dataclass(frozen=True)
class _Plan:
    """A shard to be: the positions of its rows among those of its split, whose keys ``all_keys`` are."""

    file: str
    key: str
    all_keys: _Keys
    at: slice

    @property
    def rows(self) -> tuple[str, ...]:
        """Its rows' keys."""
        return self.all_keys[self.at]


class _Keys(Sequence[str]):
    """Keys of rows, 16 bytes each, as hexadecimal digits."""

    def __init__(self, digests: bytes) -> None:
        self._digests = digests

    def __len__(self) -> int:
        return len(self._digests) // (KEY // 2)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[str, ...]: ...
    def __getitem__(self, at: int | slice) -> str | tuple[str, ...]:
        if isinstance(at, slice):
            return tuple(self[number] for number in range(*at.indices(len(self))))
        if not 0 <= at < len(self):
            raise IndexError(at)
        return self._digests[at * (KEY // 2) : (at + 1) * (KEY // 2)].hex()


class _Store:
    """The whole shards that lie in the folder, and where each row is.

    Args:
        whole: all are read and compared with their checksums, because what is there may have been damaged since, and damaged ones are left
            out. That costs two seconds for a gigabyte and a core. Otherwise only their heads are read.
    """

    def __init__(self, path: Path, workers: int, whole: bool = True) -> None:
        self.path = path
        self.shards: dict[str, Shard] = {}
        self.damaged: list[Path] = []
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._at: dict[str, tuple[str, int]] = {}
        files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
        with ThreadPoolExecutor(workers) as pool:
            for file, found in zip(files, pool.map(_try_shard if whole else _try_head, files), strict=True):
                if found:
                    self.add(*found)
                else:
                    self.damaged.append(file)

    def add(self, shard: Shard, tensors: dict[str, Tensor] | None = None) -> None:
        """Take in a shard that is there. Its tensors are read when they are needed, if they are not given."""
        self.shards[shard.file] = shard
        if tensors is not None:
            self._tensors[shard.file] = tensors
        for number, key in enumerate(shard.rows):
            self._at.setdefault(key, (shard.file, number))

    def __contains__(self, key: str) -> bool:
        return key in self._at

    def row(self, key: str) -> dict[str, Tensor]:
        """The tensors of one row, memory-mapped."""
        file, number = self._at[key]
        if file not in self._tensors:
            try:
                self._tensors[file] = read_shard(self.path / file)[1]
            except UserError:
                (self.path / file).unlink(missing_ok=True)  # the next run makes it again
                raise
        return {name: tensor[number] for name, tensor in self._tensors[file].items()}

    def has(self, plan: _Plan) -> bool:
        """Whether a shard is there as planned."""
        return plan.file in self.shards and self.shards[plan.file].key == plan.key


def _try_shard(file: Path) -> tuple[Shard, dict[str, Tensor]] | None:
    try:
        return read_shard(file)
    except UserError as error:
        log.info("%s", error)
        return None


def _try_head(file: Path) -> tuple[Shard, None] | None:
    try:
        return read_head(file), None
    except UserError as error:
        log.info("%s", error)
        return None


@dataclass(frozen=True)
class _Group:
    """Rows of a split that are brought to one size, in pixels ``(height, width)``. ``numbers`` are theirs in the split."""

    split: str
    size: Size
    numbers: Sequence[int]
    rows: Sequence[Row]
    plans: Sequence[_Plan]


@dataclass(frozen=True)
class _Part:
    """A split, or the captions: the shards that it is to have, and what they are made of.

    Attributes:
        wanted: the planned shards that are not there.
        bounds: for each of them, where its rows begin in ``missing``, and the end of the last.
        missing: what must be encoded for all of them, in order. there: keys of rows that are copied.
        encode: gives the tensors of each of ``missing[start:stop]``.
    """

    name: str
    plans: Sequence[_Plan]
    wanted: Sequence[_Plan]
    bounds: Sequence[int]
    missing: Sequence[Any]
    there: frozenset[str]
    encode: Callable[[Sequence[Any], int, int], Iterator[Encoded]]

    def share(self, number: int, of: int) -> slice:
        """The wanted shards of one process: neighbours, and about as much to encode as the others have."""
        costs = [stop - start + 1 for start, stop in pairwise(self.bounds)]  # 1 to write it
        owners = [int((end - cost / 2) * of / (sum(costs) or 1)) for end, cost in zip(accumulate(costs), costs, strict=True)]
        mine = [i for i, owner in enumerate(owners) if owner == number]
        return slice(mine[0], mine[-1] + 1) if mine else slice(0, 0)


class _Build:
    """One build: the plan of shards, and the encoders that fill them. See `_Store` for ``whole``, `fill_cache` for ``checked``."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        config: DataConfig,
        teacher: Teacher,
        encoders: Mapping[str, str],
        whole: bool = True,
        checked: bool = True,
    ) -> None:
        self.checked = checked
        self.path, self.manifest, self.config, self.teacher = path, manifest, config, teacher
        self.parts = cache_parts(manifest, config, teacher, encoders)
        self.splits = {name: select_rows(rows, config) for name, rows in manifest.splits.items()}
        self.captions = DistinctCaptions(self.splits)
        names = ("vae", "vae_dtype", "resolution", "dtype", "format")
        latents = {name: self.parts[name] for name in names} | {"layout": teacher.layout, "probe": encoders["vae"]}
        text = {name: self.parts[name] for name in ("text", "encoder_dtype", "text_dtype", "format")} | {"probe": encoders["text"]}
        self._buckets = [] if config.buckets is None else bucket_sizes(config.buckets, teacher)
        with_images = {} if isinstance(config.source, PromptsSource) else self.splits
        self._groups = [group for name, rows in with_images.items() for group in self._grouped(name, rows, latents)]
        self._text_plan = _plan(TEXT, text, self.captions, config)
        self._store = _Store(path, config.workers, whole)

    def run(self, others: Callable[[], None] | None = None) -> None:
        """Write what is missing, and the index last."""
        if self._up_to_date():
            return
        if others and any(len(part.missing) for part in self._parts()):
            for file in self._store.damaged:  # the others do not look for them
                file.unlink(missing_ok=True)
            others()
            self._store = _Store(self.path, self.config.workers, whole=False)
        self.fill(0, 1)
        latents = {name: [shard for group in self._of(name) for shard in self._planned(group.plans)] for name in self.splits}
        text = self._planned(self._text_plan)
        (self.path / INDEX).unlink(missing_ok=True)  # from here on the files are no longer those of the older cache
        rows = write_shard(self.path / ROWS, sha256_of(self.parts), (), self._caption_numbers())
        unconditional = write_shard(self.path / UNCONDITIONAL, self.parts["text"], (), self._unconditional())
        captions = self._write_captions()
        index = {
            "key": sha256_of(self.parts),
            "parts": self.parts,
            "latent_shape": list(self.teacher.latent_shape),
            **({"bucket_shapes": [[side // self._reduction for side in size] for size in self._buckets]} if self._buckets else {}),
            "splits": {name: [shard.entry() for shard in shards] for name, shards in latents.items()},
            "text": [shard.entry() for shard in text],
            "rows": rows.entry(),
            "unconditional": unconditional.entry(),
            "captions": captions,
        }
        write_text(self.path / INDEX, _json(index))
        self._remove_strangers()
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in self.splits.items())
        log.info("%s: %s; %d distinct captions", self.path, counts, len(self.captions))

    def _up_to_date(self) -> bool:
        """Whether there is nothing to do. Otherwise the log says why."""
        if not (self.path / INDEX).exists():
            return False
        try:
            old = LatentCache(self.path)
        except UserError as error:
            log.info("%s: replacing a damaged cache (%s)", self.path, error)
            return False
        changed = [MEANING[name] for name in MEANING if old.parts.get(name) != self.parts.get(name)]
        if not changed and self._holds(old.index):
            log.info("%s: up to date", self.path)
            self._remove_strangers()
            return True
        log.info("%s: replacing a stale cache (changed: %s)", self.path, ", ".join(changed) or "its files")
        return False

    def _holds(self, index: Mapping[str, Any]) -> bool:
        """Whether all files that the index names are there and whole. Other shards of the same rows are as good as the planned ones."""
        entries = [
            *index["text"],
            *(entry for shards in index["splits"].values() for entry in shards),
            index["rows"],
            index["unconditional"],
        ]
        return all(entry["file"] in self._store.shards and self._store.shards[entry["file"]].entry() == entry for entry in entries)

    @property
    def _reduction(self) -> int:
        return self.teacher.resolution // self.teacher.latent_shape[-1]

    def _of(self, split: str) -> list[_Group]:
        return [group for group in self._groups if group.split == split]  # none for prompts

    def _grouped(self, name: str, rows: Sequence[Row], recipe: Mapping[str, str]) -> Iterator[_Group]:
        """The rows of a split by the size that they are brought to."""
        if not self._buckets:
            plans = _plan(name, recipe, (row.sha256 for row in rows), self.config)
            yield _Group(name, (self.teacher.resolution, self.teacher.resolution), range(len(rows)), rows, plans)
            return
        buckets = np.fromiter((nearest(self._buckets, row.width, row.height) for row in rows), np.int64, len(rows))
        for number, size in enumerate(self._buckets):
            numbers = array("q", (buckets == number).nonzero()[0].tolist())
            if numbers:
                some = Picked(rows, numbers)
                told = {**recipe, "size": f"{size[0]}x{size[1]}"}
                yield _Group(name, size, numbers, some, _plan(name, told, (row.sha256 for row in some), self.config))

    # --- shards --------------------------------------------------------------------------------------------------------------------------

    def fill(self, number: int, of: int) -> None:
        """Write the missing shards of one of several processes."""
        for part in self._parts():
            self._write(part, part.share(number, of))

    def _parts(self) -> list[_Part]:
        """What is missing of each split and of the captions, as the folder was when it was looked at."""
        rows = [self._part(g.split, g.plans, g.rows, partial(self._encoded_rows, size=g.size)) for g in self._groups]
        return [*rows, self._part(TEXT, self._text_plan, self.captions, self._encoded_captions)]

    def _planned(self, plans: Sequence[_Plan]) -> list[Shard]:
        return [self._store.shards[plan.file] for plan in plans]

    def broken(self) -> Iterator[tuple[str, int, str]]:
        """See `broken_rows`."""
        return ((name, number, fault) for name, number, fault in self._faults() if fault is not None)

    def full(self) -> bool:
        """See `is_full`."""
        begun = any(key in self._store for group in self._groups for plan in group.plans for key in plan.rows)
        return begun and all(fault is not None for _, _, fault in self._faults())  # up to the first one that can be decoded

    def _faults(self) -> Iterator[tuple[str, int, str | None]]:
        """Split and number of each row that the folder has no latents of, and why its image cannot be decoded."""
        for group in self._groups:
            plans = (plan for plan in group.plans if not self._store.has(plan))
            missing = (plan.at.start + i for plan in plans for i, key in enumerate(plan.rows) if key not in self._store)
            for number in missing:
                row = group.rows[number]
                try:
                    self._decoded(row, self._content(row, {}, 0))
                    fault = None
                except BadFile as error:
                    fault = str(error)
                yield group.split, int(group.numbers[number]), fault

    def _part(self, name: str, plans: Sequence[_Plan], items: Sequence[Any], encode: Callable[..., Iterator[Encoded]]) -> _Part:
        wanted = [plan for plan in plans if not self._store.has(plan)]
        there = frozenset(key for plan in wanted for key in plan.rows if key in self._store)
        numbers, bounds = array("q"), array("q", [0])
        for plan in wanted:
            numbers.extend(plan.at.start + i for i, key in enumerate(plan.rows) if key not in there)
            bounds.append(len(numbers))
        return _Part(name, plans, wanted, bounds, Picked(items, numbers), there, encode)

    def _write(self, part: _Part, share: slice) -> None:
        """Write some of a part's wanted shards: rows of other shards are copied, the others encoded."""
        start, stop = part.bounds[share.start], part.bounds[share.stop]
        encoded = part.encode(part.missing, start, stop)
        copied = 0
        for number, plan in enumerate(part.wanted[share], 1):
            made = [self._store.row(key) if key in part.there else next(encoded) for key in plan.rows]
            fresh = sum(key not in part.there for key in plan.rows)
            copied += len(made) - fresh
            log.info("%s (%d/%d): %d rows, %d of them encoded", plan.file, number, share.stop - share.start, len(made), fresh)
            keys, rows = (
                [key for key, row in zip(plan.rows, made, strict=True) if row is not None],
                [row for row in made if row is not None],
            )
            if rows:
                tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
                file, key = _named(part.name, keys)
                self._store.add(write_shard(self.path / file, key, keys, tensors))
        kept = len(part.plans) - len(part.wanted)
        log.info("%s: %d rows encoded, %d copied, %d of %d files kept", part.name, stop - start, copied, kept, len(part.plans))

    def _encoded_rows(self, rows: Sequence[Row], start: int, stop: int, size: Size) -> Iterator[Encoded]:
        """Posterior mean and std ``[C, h, w]`` of each of ``rows[start:stop]`` in the cache's dtype. For SDXL ``sizes`` float32 ``[6]``.

        Rows are encoded together as if all of ``rows`` were: a batch that begins before ``start`` or ends after ``stop`` is whole.
        """
        batches = list(_around(len(rows), start, stop, self.config.batch_size))
        return islice(self._encoded_batches(rows, batches, size), start - batches[0].start if batches else 0, None)

    def _encoded_batches(self, rows: Sequence[Row], batches: Sequence[range], size: Size) -> Iterator[Encoded]:
        dtype = getattr(torch, self.config.dtype)
        with ThreadPoolExecutor(self.config.workers) as pool:
            for batch, read in self._read_ahead(rows, batches, size, pool):
                good = [i for i, fitted in enumerate(read) if fitted is not None]
                encoded: list[Encoded] = [None] * len(read)
                if good:
                    pixels, crops = zip(*(fitted for fitted in read if fitted is not None), strict=True)
                    with torch.inference_mode():
                        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
                        mean, std = (x.to("cpu", dtype) for x in self.teacher.encode_images(images))
                    _check_finite(mean, std, [batch[i] for i in good])
                    for number, (i, crop) in enumerate(zip(good, crops, strict=True)):
                        # SDXL's size conditioning: original (height, width), crop (top, left), target (height, width)
                        told = [batch[i].height, batch[i].width, *crop, *size]
                        sizes = {"sizes": torch.tensor(told, dtype=torch.float32)} if self.teacher.layout == "sdxl" else {}
                        encoded[i] = {"mean": mean[number], "std": std[number], **sizes}
                yield from encoded

    def _read_ahead(
        self, rows: Sequence[Row], batches: Sequence[range], size: Size, pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Sequence[Row], list[Fitted | None]]]:
        """Batches with their fitted images. The next batch is read while the VAE is at this one."""
        waiting: deque[tuple[Sequence[Row], list[Future[list[Fitted | None]]]]] = deque()
        for numbers in batches:
            batch = rows[numbers.start : numbers.stop]
            some = _chunks(batch, -(-len(batch) // self.config.workers))
            waiting.append((batch, [pool.submit(self._read, each, size) for each in some]))
            if len(waiting) > AHEAD:
                ready, futures = waiting.popleft()
                yield ready, [image for future in futures for image in future.result()]
        for ready, futures in waiting:
            yield ready, [image for future in futures for image in future.result()]

    def _read(self, rows: Sequence[Row], size: Size) -> list[Fitted | None]:
        packed = read_packed(self.manifest, rows)
        fitted: list[Fitted | None] = []
        for number, row in enumerate(rows):
            content = self._content(row, packed, number)
            try:
                fitted.append(fit(self._decoded(row, content), size))
            except BadFile as fault:
                if self.checked:
                    raise UserError(f"{self.manifest.where(row)}: {fault}; {CURE}.") from None
                fitted.append(None)
        return fitted

    def _content(self, row: Row, packed: dict[int, bytes], number: int) -> bytes:
        """The bytes of a row's image, which may have been read together with others. Raises UserError where they are other ones."""
        try:
            content = packed.pop(number) if number in packed else read_row(self.manifest, row)
        except BadFile:
            content = b""
        if sha256(content).hexdigest() != row.sha256:
            raise UserError(f"{self.manifest.where(row)} has changed or gone since it was validated; {CURE}.")
        return content

    def _decoded(self, row: Row, content: bytes) -> Image.Image:
        """Raises BadFile for an image that is broken, or of another size than its header said."""
        image = decode_image(content)
        if image.size != (row.width, row.height):
            raise BadFile(f"the image is {image.size[0]}x{image.size[1]}, but its header says {row.width}x{row.height}")
        return image

    def _encoded_captions(self, captions: Sequence[str], start: int, stop: int) -> Iterator[Encoded]:
        """The embeddings of each of ``captions[start:stop]``. See `_encoded_rows`."""
        for numbers in _around(len(captions), start, stop, self.config.shard_rows):  # few calls, so that few warnings count cut captions
            with torch.inference_mode():
                tensors = self._stored(self.teacher.encode_prompts(captions[numbers.start : numbers.stop]))
            for i, number in enumerate(numbers):
                if number >= start:
                    yield {name: tensor[i] for name, tensor in tensors.items()}

    def _stored(self, cond: Conditioning) -> dict[str, Tensor]:
        tensors = {"prompt_embeds": cond.prompt_embeds, "pooled": cond.pooled}
        return {name: x.to("cpu", getattr(torch, self.config.text_dtype)) for name, x in tensors.items() if x is not None}

    # --- the other files -----------------------------------------------------------------------------------------------------------------

    def _caption_numbers(self) -> dict[str, Tensor]:
        """For each split the numbers of all rows' captions, int64, and where those of each row begin."""
        tensors: dict[str, Tensor] = {}
        for name in self.splits:
            numbers, offsets = self.captions.of_split(name)
            tensors |= {f"{name}.captions": torch.from_numpy(numbers), f"{name}.caption_offsets": torch.from_numpy(offsets)}
            if self._buckets and self._of(name):
                order = np.concatenate([np.asarray(group.numbers, np.int64) for group in self._of(name)])
                buckets = np.repeat([self._buckets.index(group.size) for group in self._of(name)], [len(g.rows) for g in self._of(name)])
                tensors[f"{name}.places"] = torch.from_numpy(np.argsort(order))
                tensors[f"{name}.buckets"] = torch.from_numpy(buckets[np.argsort(order)])
        return tensors

    def _write_captions(self) -> str:
        """Write the distinct captions as a JSON list with one of them a line. The sha256 of the file."""
        digest = sha256()
        with replacing_file(self.path / CAPTIONS) as part, open(part, "wb") as file:
            for number, caption in enumerate(self.captions):
                line = f"{',' if number else '['}\n {json.dumps(caption, ensure_ascii=False)}".encode()
                digest.update(line)
                file.write(line)
            end = b"\n]\n" if len(self.captions) else b"[]\n"
            digest.update(end)
            file.write(end)
        return digest.hexdigest()

    @torch.inference_mode()
    def _unconditional(self) -> dict[str, Tensor]:
        cond = self.teacher.unconditional(1)
        return self._stored(cond) | ({} if cond.sizes is None else {"sizes": cond.sizes.to("cpu", torch.float32)})

    def _remove_strangers(self) -> None:
        """Remove shards of older caches, and what killed processes left half written."""
        keep = {ROWS, UNCONDITIONAL}
        index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
        keep |= {entry["file"] for shards in (index["text"], *index["splits"].values()) for entry in shards}
        for file in self.path.glob("*.safetensors"):
            if file.name not in keep and not file.name.startswith("."):
                file.unlink(missing_ok=True)
        for left in self.path.glob(".*.safetensors.*.tmp"):  # named by files.replacing_file
            pid = left.name.split(".")[-2]
            if pid.isdigit() and not runs_elsewhere(int(pid)):
                left.unlink(missing_ok=True)


def _plan(name: str, recipe: Mapping[str, str], contents: Iterable[str], config: DataConfig) -> list[_Plan]:
    """Shards of a split, or of the captions. A row's key is a hash of what it is made of and of what encodes it."""
    base = sha256_of(dict(recipe))
    keys = _Keys(b"".join(sha256(f"{base}\0{content}".encode()).digest()[: KEY // 2] for content in contents))
    plans = []
    for at in _groups(keys, config.shard_rows):
        plans.append(_Plan(*_named(name, keys[at]), keys, at))
    return plans


def _named(name: str, keys: Sequence[str]) -> tuple[str, str]:
    """The file of a shard with these rows, and the key of all of them."""
    key = sha256_of(list(keys))
    return f"{name}-{key[:16]}.safetensors", key


def _groups(keys: Sequence[str], size: int) -> Iterator[slice]:
    """Groups of ``size`` rows at most. Where one ends depends on the keys near its end: a row more or less changes a group or two."""
    least, spread = max(1, size // 4), max(1, size // 2)
    start = 0
    for stop, key in enumerate(keys, 1):
        full = stop - start == size or (stop - start >= least and int(key[:8], 16) % spread == 0)
        if full or stop == len(keys):
            yield slice(start, stop)
            start = stop


def bucket_sizes(buckets: Buckets, teacher: Teacher) -> list[Size]:
    """The sizes of a teacher's images.

    Raises:
        UserError: its resolution has none.
    """
    reduction = teacher.resolution // teacher.latent_shape[-1]
    if teacher.resolution % buckets.step or buckets.step % reduction:
        raise UserError(
            f"data.buckets.step is {buckets.step}: it has to divide the teacher's resolution {teacher.resolution}, and its VAE needs a "
            f"multiple of {reduction}; use {max(reduction, math.gcd(64, teacher.resolution))}."
        )
    return buckets.sizes(teacher.resolution)


def select_rows(rows: Sequence[Row], config: DataConfig) -> Sequence[Row]:
    """``max_images`` rows by hash, in their old order, each with ``max_captions`` captions. They stay where ``rows`` has them."""
    numbers: Sequence[int] = range(len(rows))
    if config.max_images is not None:
        shares = np.fromiter((share_of(row.image_id) for row in rows), np.float64, len(rows))
        numbers = array("q", np.sort(np.argsort(shares, kind="stable")[: config.max_images]).tolist())
    if config.max_captions is None:
        return Picked(rows, numbers)
    return Picked(rows, numbers, lambda row: replace(row, captions=row.captions[: config.max_captions]))


def _around(count: int, start: int, stop: int, size: int) -> Iterator[range]:
    """Of the chunks of ``size`` that ``count`` items are divided into, those that have an item of ``start:stop``."""
    return (range(i, min(i + size, count)) for i in range(start - start % size, stop, size) if start < stop)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _check_finite(mean: Tensor, std: Tensor, rows: Sequence[Row]) -> None:
    finite = mean.flatten(1).isfinite().all(1) & std.flatten(1).isfinite().all(1)
    if not finite.all():
        first = rows[int((~finite).nonzero()[0])].file
        raise UserError(
            f"{first}: the VAE gives latents that are not finite; set teacher.vae_dtype and data.dtype to float32 (SDXL's VAE needs it)."
        )


def _json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
