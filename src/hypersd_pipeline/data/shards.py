"""Rows of tar shards in webdataset's layout: one shard after the other, in constant memory, and each shard once.

webdataset groups a tar's files into samples. Its decoders are not used: they unpickle. Images, captions and JSON are read as in a folder.
A checked shard leaves two files below ``checked`` in the data set's folder: its good rows, and the report of what was left out.
An interrupted run goes on with the next shard. A shard that changed, and every shard after a change of the filters, is checked again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tarfile
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from hypersd_pipeline.data.config import ShardFilters, ShardsSource, SplitSource
from hypersd_pipeline.data.images import MAX_BYTES, decode_image, image_size
from hypersd_pipeline.data.lines import Lines
from hypersd_pipeline.data.place import Place, reason_of
from hypersd_pipeline.data.reading import MAX_TEXT, BadFile, decode_text, is_text, name_fault, parse_json, plain, printable
from hypersd_pipeline.data.rows import Rejected, Row, parse_row, share_of
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import file_sha256, replacing_file, sha256_of, write_text

log = logging.getLogger(__name__)

FORMAT = 1  # goes into the name of each checked shard: raise it where other rows would come out
IMAGES = ("jpg", "jpeg", "png", "webp")
READ = {**dict.fromkeys(IMAGES, MAX_BYTES), "txt": MAX_TEXT, "json": MAX_TEXT}  # what is read, and bytes of it at most
LISTED = 1000  # faults of a shard that are listed one by one. The others are counted
MOST = 1_000_000  # shards
TRIES = 3  # of a shard that comes through a network
CHECKED = "checked"


def shard_splits(source: ShardsSource) -> dict[str, SplitSource]:
    """Where each split comes from: "." stands for all shards."""
    return source.splits or {
        "train": SplitSource(share=(0.0, 0.9)),
        "val": SplitSource(share=(0.9, 0.95)),
        "test": SplitSource(share=(0.95, 1.0)),
    }


def shard_names(source: ShardsSource, place: Place, of: str) -> list[str]:
    """The shards that a pattern means, in order.

    Raises:
        UserError: the braces are unbalanced, there are too many, or no file fits.
    """
    from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

    pattern = source.shards if of == "." else of
    count = 1
    for low, high in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern):
        count *= abs(int(high) - int(low)) + 1
    try:
        names = list(islice(braceexpand(pattern), MOST + 1)) if count <= MOST else []
    except UnbalancedBracesError:
        raise UserError(f"data.source: {pattern!r} has a brace without its partner; write {{00000..00099}}.tar.") from None
    if count > MOST or len(names) > MOST:
        raise UserError(f"data.source: {pattern!r} means more than {MOST} shards; give fewer.")
    found = [each for name in names for each in (place.names(name) if set(name) & set("*?[") else [name])]
    if not found:
        raise UserError(f"data.source: no file below {place.root} fits {pattern!r}; check root, shards and splits.")
    return list(dict.fromkeys(plain("", name) for name in found))


def check_shards(
    source: ShardsSource, folder: Path, workers: int, others: Callable[[], None] | None = None, decode: bool = True
) -> tuple[dict[str, Lines[Row]], list[tuple[str, Rejected]]]:
    """Check all shards, several at once, and divide their rows into splits.

    Args:
        folder: of the data set, where what was checked is kept. workers: shards that are read at once.
        others: called where several shards are to be checked. It may have other processes call `check_some`.
        decode: the images, to see that they are whole. Otherwise only their headers are read.

    Returns:
        The good rows of each split, which lie on the disk, and the reports of what was left out with the split they belong to.

    Raises:
        UserError: a shard is missing, empty or cannot be reached, or the server gives no parts of files.
    """
    layout, check = shard_splits(source), _Check(source, folder, workers, decode)
    waiting = check.waiting()
    if len(waiting) < len(check.parts):
        log.info("%d of %d shards were checked before", len(check.parts) - len(waiting), len(check.parts))
    if others and len(waiting) > 1:
        others()
        waiting = check.waiting()
    reports = check.run(waiting)
    rows, refused = _divide(layout, check.shards, check.parts, reports)
    _remove_others(folder / CHECKED, check.parts.values())
    return rows, refused


def check_some(
    source: ShardsSource, folder: Path, workers: int, number: int, of: int, ready: Callable[[], None], decode: bool = True
) -> None:
    """Check the shards of one of several processes. `check_shards`, which has them started, goes on with all.

    Args:
        number: of this process, below ``of``, how many there are.
        ready: waits until all of them have looked at what is there. From then on they write.

    Raises:
        UserError: as `check_shards`.
    """
    check = _Check(source, folder, workers, decode)
    waiting = check.waiting()
    ready()
    check.run(waiting[number::of])


class _Check:
    """The shards of a data set, and what is kept of each of them.

    Attributes:
        shards: names by what the splits are made of. parts: by name.

    Raises:
        UserError: see `check_shards`.
    """

    def __init__(self, source: ShardsSource, folder: Path, workers: int, decode: bool) -> None:
        self.source, self.place, self.workers, self.decode = source, Place(source.root), workers, decode
        layout = shard_splits(source)
        self.shards = {of: shard_names(source, self.place, of) for of in dict.fromkeys(split.of for split in layout.values())}
        owners: dict[str, str] = {}
        for of, names in self.shards.items():
            for name in names:
                if owners.setdefault(name, of) != of:
                    raise UserError(
                        f"data.source.splits: {of!r} and {owners[name]!r} both have {name}; give each split its own shards or shares."
                    )
        todo = list(owners)
        self.place.state(todo[0])
        self.place.check_parts(todo[0])
        settings = [FORMAT, self.place.root, source.caption_key, source.filters.model_dump(mode="json"), *([] if decode else ["headers"])]
        with ThreadPoolExecutor(workers) as pool:
            states = zip(todo, pool.map(self.place.state, todo), strict=True)
            self.parts = {name: _Part(folder / CHECKED, sha256_of([name, state, *settings])[:32]) for name, state in states}

    def waiting(self) -> list[str]:
        """The shards that must be checked."""
        return [name for name, part in self.parts.items() if not part.finished()]

    def run(self, names: Sequence[str]) -> dict[str, Report]:
        """Check some shards, several at once."""
        with ThreadPoolExecutor(self.workers) as pool:
            filled = pool.map(lambda name: self.parts[name].fill(self.place, name, self.source, self.decode), names)
            return dict(zip(names, filled, strict=True))


def _divide(
    layout: dict[str, SplitSource], shards: dict[str, list[str]], parts: dict[str, _Part], fresh: dict[str, Report]
) -> tuple[dict[str, Lines[Row]], list[tuple[str, Rejected]]]:
    """Good rows by split in the order of shards, and reports. A shard that several splits share reports to all of them at once."""
    files = {name: cast(BinaryIO, tempfile.TemporaryFile()) for name in layout}
    starts = {name: array("q", [0]) for name in layout}
    refused: list[tuple[str, Rejected]] = []
    for of, names in shards.items():
        takers = {name: split.share for name, split in layout.items() if split.of == of}
        label = ", ".join(takers)
        for shard in names:
            report = fresh.get(shard) or parts[shard].report()
            refused += [(label, rejected) for rejected in report.table(shard)]
            if report.broken:
                continue
            with open(parts[shard].rows, "rb") as file:
                for line in file:
                    share = share_of(json.loads(line)["image_id"])
                    for name, (low, high) in takers.items():
                        if low <= share < high:
                            files[name].write(line)
                            starts[name].append(starts[name][-1] + len(line))
    for spool in files.values():
        spool.flush()
    return {name: Lines(files[name], parse_row, starts[name]) for name in layout}, refused


def _remove_others(folder: Path, parts: Iterable[_Part]) -> None:
    """Remove what was checked of shards, or with filters, that are no longer used."""
    keep = {path.name for part in parts for path in (part.rows, part.head)}
    for path in folder.iterdir():
        if path.name not in keep and path.is_file():
            path.unlink(missing_ok=True)


# --- what is kept of a shard -------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What was left out of a shard. ``broken`` says why nothing of it is used."""

    listed: list[Rejected] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    broken: str | None = None

    def reject(self, file: str, row: str, reason: str) -> None:
        """A file or a sample with a fault."""
        if len(self.listed) < LISTED:
            self.listed.append(Rejected(printable(file), printable(row), printable(reason)))
        else:
            self.counts["further faults, which are not listed one by one"] += 1

    def table(self, shard: str) -> list[Rejected]:
        """As rows of the table of what was left out."""
        if self.broken:
            return [Rejected(shard, "(all)", f"the shard is skipped: {self.broken}")]
        return [*self.listed, *(Rejected(shard, f"{count} rows", reason) for reason, count in sorted(self.counts.items()))]


class _Part:
    """The two files of a checked shard. The report is written last, and has the checksum of the rows."""

    def __init__(self, folder: Path, key: str) -> None:
        self.rows, self.head = folder / f"{key}.jsonl", folder / f"{key}.json"

    def finished(self) -> bool:
        """Whether the shard was checked before, and the files are whole."""
        try:
            self.report()
            return bool(json.loads(self.head.read_bytes())["rows"] == file_sha256(self.rows))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def report(self) -> Report:
        """The report of a checked shard."""
        head = json.loads(self.head.read_bytes())
        return Report([Rejected(*entry) for entry in head["listed"]], Counter(head["counts"]), head["broken"])

    def fill(self, place: Place, shard: str, source: ShardsSource, decode: bool) -> Report:
        """Check a shard. Nothing is kept of one that could not be read to its end for want of a network."""
        for number in range(TRIES):
            report = Report()
            with replacing_file(self.rows) as path, open(path, "wb") as rows:
                try:
                    with place.open(shard) as file:
                        rows.writelines(row.line() for row in _good_rows(file, shard, source, report, decode))
                except (tarfile.TarError, BadFile) as error:
                    report.broken = str(error)
                except Exception as error:  # of the network: each file system has classes of its own
                    log.warning("%s: %s (try %d of %d)", shard, reason_of(error), number + 1, TRIES)
                    report.broken = f"it could not be read ({reason_of(error)}); run data_prep again"
                    continue
                if report.broken:
                    rows.seek(0)
                    rows.truncate()
            head = {"listed": [[r.file, r.row, r.reason] for r in report.listed], "counts": report.counts, "broken": report.broken}
            write_text(self.head, json.dumps({**head, "rows": file_sha256(self.rows)}))
            break
        if report.broken:
            log.warning("%s/%s is skipped: %s", place.root, shard, report.broken)
        return report


# --- a tar -------------------------------------------------------------------------------------------------------------------------------


class _Info(tarfile.TarInfo):
    """A tar's header that tells a proper end from a broken one, and is not led to read what is no file into memory."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        errors: Any = tarfile
        try:
            return super().fromtarfile(tar)
        except errors.EOFHeaderError:  # a block of zeros: the end
            raise
        except errors.HeaderError as error:
            what = {"empty header": "it ends without an end mark", "truncated header": "it ends in the middle of a header"}
            raise tarfile.ReadError(f"the tar is damaged or compressed ({what.get(str(error), str(error))})") from None

    def _proc_member(self, tar: Any) -> Any:
        extended = self.type in (
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
        )
        if self.size < 0 or (extended and self.size > MAX_TEXT):
            raise tarfile.ReadError(f"the tar is damaged (a header of {self.size} bytes)")
        return super()._proc_member(tar)  # type: ignore[misc]


@dataclass(frozen=True)
class _Member:
    """A file of a tar: where its bytes begin, and the bytes."""

    name: str
    start: int
    content: bytes


def _members(file: BinaryIO, shard: str, report: Report) -> Iterator[dict[str, Any]]:
    """The images, captions and JSON files of a tar, as webdataset's grouping wants them. Everything else is reported.

    Raises:
        tarfile.TarError: the tar is no tar, compressed, damaged, or ends too early.
    """
    others: Counter[str] = Counter()
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_Info, encoding="utf-8", errors="surrogateescape") as tar:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
            name, suffix = info.name, PurePosixPath(info.name).name.partition(".")[2].lower()
            if info.isdir():
                continue
            if fault := _member_fault(info, suffix):
                report.reject(f"{shard}/{name}", name, fault)
            elif suffix not in READ:
                others[suffix] += 1
            else:
                stream = tar.extractfile(info)
                assert stream is not None  # a regular file
                content = stream.read()
                if len(content) != info.size:
                    raise tarfile.ReadError("it ends in the middle of a file")
                yield {"fname": name, "data": _Member(name, info.offset_data, content), "__url__": shard}
    for suffix, count in others.items():
        report.counts[f"files .{printable(suffix, 20)} are not read" if suffix else "files without a suffix are not read"] += count


def _member_fault(info: tarfile.TarInfo, suffix: str) -> str | None:
    if not is_text(info.name):
        return "the file name is no valid UTF-8"
    if fault := name_fault(info.name):
        return fault
    if not info.isreg():
        kind = "a link" if info.issym() or info.islnk() else "a device or a pipe"
        return f"it is no regular file but {kind}"
    if info.issparse():
        return "it is a sparse file, which is not read"
    if suffix in READ and info.size > READ[suffix]:
        return f"the file has {info.size} bytes, {READ[suffix]} at most are read"
    return None


def _good_rows(file: BinaryIO, shard: str, source: ShardsSource, report: Report, decode: bool) -> Iterator[Row]:
    """The good rows of a tar. The others are reported."""
    from webdataset.tariterators import group_by_keys

    seen: set[bytes] = set()

    def twice(error: Exception) -> bool:
        report.reject(shard, "(file)", printable(f"a second file of the same name: {error.args[0]}", 120))
        return True

    samples: Iterable[dict[str, Any]] = group_by_keys(_members(file, shard, report), handler=twice)
    count = 0
    for sample in samples:
        count += 1
        key = str(sample["__key__"])
        digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
        if digest in seen:
            report.reject(f"{shard}/{key}", key, "duplicate key: the tar has files of this key in an earlier place too")
            continue
        seen.add(digest)
        try:
            row = _row(sample, key, shard, source, decode)
        except BadFile as fault:
            report.reject(f"{shard}/{key}", key, str(fault))
            continue
        if isinstance(row, Row):
            yield row
        else:
            report.counts[row] += 1
    if not count:
        report.reject(shard, "(all)", "the shard has no sample of an image with a .txt or .json")


def _row(sample: dict[str, Any], key: str, shard: str, source: ShardsSource, decode: bool) -> Row | str:
    """The row of a sample, or the filter that leaves it out.

    Raises:
        BadFile: the sample has a fault.
    """
    found = [sample[suffix] for suffix in IMAGES if suffix in sample]
    if not found:
        raise BadFile(f"there is no image ({', '.join('.' + suffix for suffix in IMAGES)})")
    if len(found) > 1:
        raise BadFile(f"there are {len(found)} images of one key")
    image, meta = found[0], _meta(sample)
    captions = _captions(sample, meta, source.caption_key)
    if reason := _low_score(source.filters, meta):
        return reason
    width, height = decode_image(image.content).size if decode else image_size(image.content)
    if reason := _wrong_size(source.filters, width, height):
        return reason
    inside = (shard, image.start, len(image.content))
    digest = hashlib.sha256(image.content).hexdigest()
    return Row(f"{shard}/{key}", f"{shard}/{image.name}", captions, width, height, 0, digest, inside)


def _meta(sample: dict[str, Any]) -> dict[str, Any]:
    if "json" not in sample:
        return {}
    try:
        meta = parse_json(decode_text(sample["json"].content))
    except BadFile as fault:
        raise BadFile(f"the .json cannot be read ({fault})") from None
    if not isinstance(meta, dict):
        raise BadFile("the .json is no JSON object")
    return meta


def _captions(sample: dict[str, Any], meta: dict[str, Any], key: str) -> tuple[str, ...]:
    """One caption a line of the ``.txt``, or the caption of the ``.json``."""
    if "txt" in sample:
        try:
            texts = decode_text(sample["txt"].content).splitlines()
        except BadFile as fault:
            raise BadFile(f"the .txt {fault}; save it as UTF-8") from None
    elif isinstance(meta.get(key), str):
        texts = [meta[key]]
    else:
        raise BadFile(f"there is no caption: no .txt, and no text {key!r} in a .json")
    captions = tuple(text.strip() for text in texts if text.strip())
    if not captions:
        raise BadFile("the caption is empty")
    if not all(map(is_text, captions)):
        raise BadFile("a caption has a lone surrogate, which is no text")
    return captions


# --- filters -----------------------------------------------------------------------------------------------------------------------------


def _low_score(filters: ShardFilters, meta: dict[str, Any]) -> str | None:
    for key, (low, high) in filters.scores.items():
        value = meta.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            return f"filter: {key} is missing or no number"
        if low is not None and value < low:
            return f"filter: {key} is below {low:g}"
        if high is not None and value > high:
            return f"filter: {key} is above {high:g}"
    return None


def _wrong_size(filters: ShardFilters, width: int, height: int) -> str | None:
    if filters.min_side is not None and min(width, height) < filters.min_side:
        return f"filter: the shorter side is below {filters.min_side}"
    if filters.aspect is not None and not filters.aspect[0] <= width / height <= filters.aspect[1]:
        return f"filter: width / height is outside {filters.aspect[0]:g} to {filters.aspect[1]:g}"
    return None
