"""Row validation: every row is read and checked; bad ones go to a table, good ones to the manifest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pandas as pd
from PIL import UnidentifiedImageError

from hypersd_pipeline.data.coco import mask_fault, read_coco
from hypersd_pipeline.data.config import CocoSource, FolderSource, Source, SplitSource, TwemojiSource
from hypersd_pipeline.data.folder import folder_splits, read_folder
from hypersd_pipeline.data.images import decode_image
from hypersd_pipeline.data.rows import Manifest, RawRow, Rejected, Row, share_of
from hypersd_pipeline.data.twemoji import SPLITS
from hypersd_pipeline.errors import UserError

log = logging.getLogger(__name__)

COLUMNS = ["file", "row", "split", "reason"]


def validate(source: Source, dataset: Path, workers: int = 4) -> tuple[Manifest, pd.DataFrame]:
    """Check every row of a source.

    Args:
        dataset: the generated data set's folder; other sources bring their own ``root``.
        workers: threads that read images.

    Returns:
        The manifest of good rows, and a table (file, row, split, reason): a line for each row, or caption of a good row, left out.

    Raises:
        UserError: an annotation file is unusable, or a split has no good row.
    """
    root = dataset if isinstance(source, TwemojiSource) else Path(source.root).expanduser().absolute()
    good: dict[str, tuple[Row, ...]] = {}
    refused: list[tuple[str, Rejected]] = []
    for name, rows in read_splits(source, root).items():
        kept, bad = _validate_split(root, rows, workers)
        log.info("%s: %d good rows, %d reports of bad ones", name, len(kept), len(bad))
        refused += [(name, report) for report in bad]
        if not kept and bad:
            raise UserError(
                f"{root}: split {name!r} has no good row, {len(bad)} bad ones (first: {bad[0].file}, {bad[0].row}: {bad[0].reason}); "
                "mend the files, or check data.source."
            )
        if kept:
            good[name] = tuple(kept)
        else:
            log.warning("split %r is empty and is left out", name)
    if not good:
        raise UserError(f"{root} has no images; check data.source.")
    _warn_of_shared_images(good)
    table = pd.DataFrame([(report.file, report.row, split, report.reason) for split, report in refused], columns=COLUMNS)
    return Manifest(root, good), table


def read_splits(source: Source, root: Path) -> dict[str, Iterator[RawRow | Rejected]]:
    """Unchecked rows of every split, by our names."""
    if isinstance(source, FolderSource):
        return {name: _share(split, read_folder(source, root, split.of)) for name, split in folder_splits(source, root).items()}
    if isinstance(source, TwemojiSource):
        source = CocoSource(kind="coco", root=str(root), splits={name: SplitSource(of=name) for name in SPLITS})
    return {name: _share(split, read_coco(source, root, split.of)) for name, split in source.splits.items()}


def _share(split: SplitSource, rows: Iterator[RawRow | Rejected]) -> Iterator[RawRow | Rejected]:
    low, high = split.share
    return (row for row in rows if low <= share_of(row.image_id if isinstance(row, RawRow) else row.row) < high)


def _validate_split(root: Path, rows: Iterator[RawRow | Rejected], workers: int) -> tuple[list[Row], list[Rejected]]:
    bad: list[Rejected] = []
    unique: dict[str, RawRow] = {}
    for row in rows:
        if isinstance(row, Rejected):
            bad.append(row)
        elif row.image_id in unique:
            bad.append(Rejected(_file(row), row.label, f"duplicate id {row.image_id} (first at {unique[row.image_id].label})"))
        else:
            unique[row.image_id] = row
    kept: list[Row] = []
    with ThreadPoolExecutor(workers) as pool:
        for checked, reports in pool.map(partial(check_row, root), unique.values()):
            kept += [checked] if checked else []
            bad += reports
    return kept, bad


def check_row(root: Path, raw: RawRow) -> tuple[Row | None, list[Rejected]]:
    """The good row (None if it is bad) and what is wrong with it; a good row may lose some of its captions."""
    report = partial(Rejected, _file(raw), raw.label)
    captions = [c.strip() for c in raw.captions if isinstance(c, str) and c.strip()]
    if not captions:
        return None, [report("the caption is empty" if raw.captions else "there is no caption")]
    if fault := _name_fault(raw.file_name):
        return None, [report(fault)]
    file = PurePosixPath(raw.folder) / raw.file_name
    try:
        content = (root / file).read_bytes()
        width, height = _decoded_size(content)
    except FileNotFoundError:
        return None, [report("the file is missing")]
    except UnidentifiedImageError:
        return None, [report("the image cannot be read (no known image format)")]
    except Exception as error:  # image decoders raise whatever they like on broken content
        return None, [report(f"the image cannot be read ({str(error).replace(chr(10), ' ')[:120] or type(error).__name__})")]
    if fault := _size_fault(raw, width, height) or _instances_fault(raw, width, height):
        return None, [report(fault)]
    dropped = len(raw.captions) - len(captions)
    reports = [report(f"{dropped} of {len(raw.captions)} captions are empty; the row is kept with the others")] if dropped else []
    row = Row(raw.image_id, file.as_posix(), tuple(captions), width, height, len(raw.instances), hashlib.sha256(content).hexdigest())
    return row, reports


def _file(raw: RawRow) -> str:
    return (PurePosixPath(raw.folder) / raw.file_name).as_posix() if isinstance(raw.file_name, str) else raw.folder


def _name_fault(name: Any) -> str | None:
    if not isinstance(name, str) or not name.strip():
        return "the row names no file"
    windows = PureWindowsPath(name)  # understands both kinds of slash, and drives
    if name.startswith("/") or windows.anchor or ".." in windows.parts or "\0" in name:
        return "the file name leads out of the images' folder"
    return None


def _decoded_size(content: bytes) -> tuple[int, int]:
    if not content:
        raise ValueError("the file has zero bytes")
    return decode_image(content).size


def _size_fault(raw: RawRow, width: int, height: int) -> str | None:
    if raw.size is None or raw.size == (width, height):
        return None
    if not all(isinstance(side, int) and side > 0 for side in raw.size):
        return f"the stated size is zero or no number: {raw.size[0]}x{raw.size[1]}"
    return f"the image is {width}x{height}, but {raw.size[0]}x{raw.size[1]} is stated, so its masks would not fit"


def _instances_fault(raw: RawRow, width: int, height: int) -> str | None:
    return next((fault for instance in raw.instances if (fault := mask_fault(instance, width, height))), None)


def _warn_of_shared_images(splits: Mapping[str, tuple[Row, ...]]) -> None:
    """The same picture in two splits makes evaluation look better than it is."""
    first: dict[str, str] = {}
    shared = 0
    for name, rows in splits.items():
        shared += sum(first.setdefault(row.sha256, name) != name for row in rows)
    if shared:
        log.warning("%d images are, byte for byte, in more than one split: figures on held-out splits will flatter", shared)
