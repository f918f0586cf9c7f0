"""Row validation: every row is read and checked. Bad ones go to a table, good ones to the manifest."""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from hypersd_pipeline.data.coco import instance_fault, read_coco
from hypersd_pipeline.data.config import CocoSource, FolderSource, PromptsSource, ShardsSource, Source, SplitSource, TwemojiSource
from hypersd_pipeline.data.folder import folder_splits, read_folder, strays
from hypersd_pipeline.data.images import MAX_BYTES, decode_image
from hypersd_pipeline.data.lines import Picked
from hypersd_pipeline.data.place import scheme_of
from hypersd_pipeline.data.prompts import check_prompts, prompt_splits
from hypersd_pipeline.data.reading import BadFile, is_text, name_fault, plain, printable, read_inside, shown
from hypersd_pipeline.data.rows import Manifest, RawRow, Rejected, Row, share_of
from hypersd_pipeline.data.shards import check_shards, shard_splits
from hypersd_pipeline.data.twemoji import SPLITS
from hypersd_pipeline.errors import UserError

if TYPE_CHECKING:  # rows are read, and stages are trained, without the table of what was left out
    import pandas as pd

log = logging.getLogger(__name__)

COLUMNS = ["file", "row", "split", "reason"]
NEEDED = ("train", "test")
RowSource = TwemojiSource | CocoSource | FolderSource  # sources that are read row by row
TEST_ROWS = 4  # what the evaluation needs to estimate a distance
NO_SPLIT = "(none)"


def validate(
    source: Source,
    dataset: Path,
    workers: int = 4,
    complete: bool = False,
    others: Callable[[], None] | None = None,
    decode: bool = True,
) -> tuple[Manifest, pd.DataFrame]:
    """Check every row of a source.

    Args:
        dataset: the generated data set's folder. Other sources bring their own ``root``.
        workers: threads that read images.
        complete: also refuse what the stages cannot work with: no split ``train`` or ``test``, or too few test rows.
        others, decode: see `hypersd_pipeline.data.shards.check_shards`. Images of other sources are always decoded here.

    Returns:
        The manifest of good rows, and a table (file, row, split, reason): a line for each row, or caption of a good row, left out,
        and for each file of a folder source that no row uses.

    Raises:
        UserError: the root is no folder of images, an annotation file is unusable, a split has no good row, or an image is in two splits.
            With ``complete`` also the above.
    """
    if isinstance(source, ShardsSource):
        return _validate_shards(source, dataset, workers, complete, others, decode)
    if isinstance(source, PromptsSource):
        return _validate_prompts(source, complete)
    root = dataset if isinstance(source, TwemojiSource) else Path(os.path.expanduser(source.root)).absolute()
    _check_root(root, dataset)
    refused: list[tuple[str, Rejected]] = []
    splits: dict[str, list[RawRow]] = {}
    sources = read_splits(source, root)
    layout = _layout(source, root)
    if complete:
        _check_names(sources)
    for name, rows in sources.items():
        try:
            splits[name], bad = _divide(rows)
        except UserError as error:
            raise _damaged(root, str(error).partition(";")[0]) if isinstance(source, TwemojiSource) else error from None
        refused += [(name, report) for report in bad]
    if isinstance(source, FolderSource):
        refused += [(NO_SPLIT, report) for report in strays(root, layout)]
    _check_overlap(splits)
    if complete:
        _check_enough(splits, layout)
    good = _check_rows(root, splits, refused, workers)
    if not good:
        raise UserError(f"{root} has no images{_first(refused)}; check data.source.")
    if isinstance(source, TwemojiSource) and refused:
        raise _damaged(root, f"{refused[0][1].file}: {refused[0][1].reason}")
    if complete:
        _check_names(good)
        _check_enough(good, layout)
    _check_copies(good)
    return Manifest(root, good), _table(refused)


def _table(refused: Sequence[tuple[str, Rejected]]) -> pd.DataFrame:
    import pandas as pd

    lines = [(printable(r.file), printable(r.row), split, printable(r.reason)) for split, r in refused]
    return pd.DataFrame(lines, columns=COLUMNS)


def _validate_shards(
    source: ShardsSource, dataset: Path, workers: int, complete: bool, others: Callable[[], None] | None, decode: bool
) -> tuple[Manifest, pd.DataFrame]:
    """:func:`validate` for shards, whose rows stay on the disk."""
    layout = shard_splits(source)
    if complete:
        _check_names(layout)
    here = scheme_of(source.root) is None
    root = Path(os.path.expanduser(source.root)).absolute() if here else dataset
    if here:
        _check_root(root, dataset)
        if not os.path.isdir(root):
            raise UserError(f"data.source.root: {printable(str(root))} is not a folder; give the folder that holds the shards.")
    splits, refused = check_shards(source, dataset, workers, others, decode)
    good = _without_empty(splits)
    if not good:
        raise UserError(f"{source.root} has no images{_first(refused)}; check data.source.")
    if complete:
        _check_names(good)
        _check_enough(good, layout)
    _check_copies(good)
    return Manifest(root, good, None if here else source.root.rstrip("/")), _table(refused)


def without_rows(source: ShardsSource, manifest: Manifest, bad: Sequence[tuple[str, int, str]]) -> tuple[Manifest, pd.DataFrame]:
    """The manifest without rows whose images turned out to be broken, and a table of them.

    Args:
        bad: split, number of the row, and reason.

    Raises:
        UserError: too few rows are left.
    """
    refused = [
        (split, Rejected(row.file, row.image_id.rpartition("/")[2], reason))
        for split, number, reason in bad
        for row in [manifest.splits[split][number]]
    ]
    out = {split: {number for name, number, _ in bad if name == split} for split in manifest.splits}
    good = {name: Picked(rows, array("q", (i for i in range(len(rows)) if i not in out[name]))) for name, rows in manifest.splits.items()}
    left = _without_empty(good)
    _check_names(left)
    _check_enough(left, shard_splits(source))
    return replace(manifest, splits=left), _table(refused)


def _validate_prompts(source: PromptsSource, complete: bool) -> tuple[Manifest, pd.DataFrame]:
    """:func:`validate` for captions without images."""
    layout = prompt_splits(source)
    if complete:
        _check_names(layout)
    splits, reports = check_prompts(source)
    refused = [(NO_SPLIT, report) for report in reports]
    good = _without_empty(splits)
    if not good:
        raise UserError(f"{source.file} has no captions{_first(refused)}; check data.source.")
    if complete:
        _check_names(good)
        _check_enough(good, layout)
    return Manifest(Path(os.path.expanduser(source.file)).absolute().parent, good), _table(refused)


def _without_empty(splits: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """The splits that have rows. The log says which ones have none."""
    good: dict[str, Sequence[Row]] = {}
    for name, rows in splits.items():
        log.info("%s: %d good rows", name, len(rows))
        if len(rows):
            good[name] = rows
        else:
            log.warning("split %r is empty and is left out", name)
    return good


def read_splits(source: RowSource, root: Path) -> dict[str, Iterator[RawRow | Rejected]]:
    """Unchecked rows of every split, by our names."""
    layout = _layout(source, root)
    if isinstance(source, FolderSource):
        return {name: _share(split, read_folder(source, root, split.of)) for name, split in layout.items()}
    if isinstance(source, TwemojiSource):
        source = CocoSource(kind="coco", root=str(root), splits=layout)
    return {name: _share(split, read_coco(source, root, split.of)) for name, split in layout.items()}


def _layout(source: RowSource, root: Path) -> dict[str, SplitSource]:
    """Where each split comes from."""
    if isinstance(source, FolderSource):
        return folder_splits(source, root)
    return {name: SplitSource(of=name) for name in SPLITS} if isinstance(source, TwemojiSource) else source.splits


def _share(split: SplitSource, rows: Iterator[RawRow | Rejected]) -> Iterator[RawRow | Rejected]:
    low, high = split.share
    return (row for row in rows if low <= share_of(row.image_id if isinstance(row, RawRow) else row.row) < high)


def _divide(rows: Iterator[RawRow | Rejected]) -> tuple[list[RawRow], list[Rejected]]:
    """Rows with an id of their own, and the others."""
    bad: list[Rejected] = []
    unique: dict[str, RawRow] = {}
    for row in rows:
        if isinstance(row, Rejected):
            bad.append(row)
        elif row.image_id in unique:
            bad.append(Rejected(_file(row), row.label, f"duplicate id {row.image_id} (first at {unique[row.image_id].label})"))
        else:
            unique[row.image_id] = row
    return list(unique.values()), bad


def _check_rows(
    root: Path, splits: Mapping[str, Sequence[RawRow]], refused: list[tuple[str, Rejected]], workers: int
) -> dict[str, tuple[Row, ...]]:
    """The good rows of each split that has any. Reports of the others are added to ``refused``."""
    good: dict[str, tuple[Row, ...]] = {}
    for name, rows in splits.items():
        kept: list[Row] = []
        with ThreadPoolExecutor(workers) as pool:
            for checked, reports in pool.map(partial(check_row, root), rows):
                kept += [checked] if checked else []
                refused += [(name, report) for report in reports]
        bad = [report for split, report in refused if split == name]
        log.info("%s: %d good rows, %d reports of bad ones", name, len(kept), len(bad))
        if not kept and bad:
            raise UserError(
                f"{root}: split {name!r} has no good row, {len(bad)} bad ones{_first(refused, name)}; mend the files, or check data.source."
            )
        if kept:
            good[name] = tuple(kept)
            _warn_of_crowds(name, rows)
        else:
            log.warning("split %r is empty and is left out", name)
    return good


def _first(refused: Sequence[tuple[str, Rejected]], split: str | None = None) -> str:
    """The first report of a split, or of all, in brackets."""
    report = next((report for name, report in refused if split in (None, name)), None)
    return "" if report is None else f" (first: {printable(report.file)}, {printable(report.row)}: {printable(report.reason)})"


def check_row(root: Path, raw: RawRow) -> tuple[Row | None, list[Rejected]]:
    """The good row (None if it is bad) and what is wrong with it; a good row may lose some of its captions."""
    report = partial(Rejected, _file(raw), raw.label)
    captions = [c.strip() for c in raw.captions if isinstance(c, str) and c.strip()]
    if not captions:
        return None, [report("the caption is empty" if raw.captions else "there is no caption")]
    if not all(map(is_text, captions)):
        return None, [report("a caption has a lone surrogate, which is no text")]
    if fault := name_fault(raw.file_name):
        return None, [report(fault)]
    file = PurePosixPath(raw.folder) / raw.file_name
    try:
        content = read_inside(root, file, MAX_BYTES)
        width, height = decode_image(content).size
    except BadFile as error:
        return None, [report(str(error))]
    if fault := _size_fault(raw, width, height) or _instances_fault(raw, width, height):
        return None, [report(fault)]
    dropped = len(raw.captions) - len(captions)
    reports = [report(f"{dropped} of {len(raw.captions)} captions are empty; the row is kept with the others")] if dropped else []
    row = Row(raw.image_id, file.as_posix(), tuple(captions), width, height, len(raw.instances), hashlib.sha256(content).hexdigest())
    return row, reports


def _file(raw: RawRow) -> str:
    return (PurePosixPath(raw.folder) / raw.file_name).as_posix() if isinstance(raw.file_name, str) else raw.folder


def _size_fault(raw: RawRow, width: int, height: int) -> str | None:
    if raw.size is None or raw.size == (width, height):
        return None
    if not all(type(side) is int and side > 0 for side in raw.size):
        return f"the stated size is zero or no number: {shown(raw.size[0])}x{shown(raw.size[1])}"
    stated = f"{shown(raw.size[0])}x{shown(raw.size[1])}"
    return f"the image is {width}x{height}, but {stated} is stated, so its masks would not fit"


def _instances_fault(raw: RawRow, width: int, height: int) -> str | None:
    return next((fault for instance in raw.instances if (fault := instance_fault(instance, width, height))), None)


# --- the source as a whole ---------------------------------------------------------------------------------------------------------------


def _check_root(root: Path, dataset: Path) -> None:
    """Raises UserError for a root that is the project or holds it: every image that the project draws would be taken for data."""
    project = os.path.isfile(root / "pyproject.toml") and os.path.isdir(root / "conf" / "base")
    if project or Path(os.path.realpath(root)) in Path(os.path.realpath(dataset)).parents:
        raise UserError(
            f"data.source.root: {root} is the project's own folder or lies above it; give a folder that holds nothing but images."
        )


def _damaged(root: Path, reason: str) -> UserError:
    return UserError(
        f"{root}: the embedded data set is damaged ({reason}); run data_prep again, which draws it anew (kedro run --pipelines data_prep)."
    )


def _check_names(splits: Mapping[str, Any]) -> None:
    if missing := [name for name in NEEDED if name not in splits]:
        raise UserError(
            f"data.source: there is no split {' and no split '.join(map(repr, missing))} but {', '.join(splits)}; "
            f"add a subfolder {missing[0]}, or name it in data.source.splits."
        )


def _check_enough(splits: Mapping[str, Sequence[RawRow | Row]], layout: Mapping[str, SplitSource]) -> None:
    """Raises UserError for fewer test rows than the evaluation needs, and says how to split."""
    for name, need in (("train", 1), ("test", TEST_ROWS)):
        found = len(splits.get(name, ()))
        if found < need:
            raise UserError(f"data.source: the split {name!r} has {found} rows, {need} at least are needed; {_cure(splits, layout, name)}.")


def _cure(splits: Mapping[str, Sequence[RawRow | Row]], layout: Mapping[str, SplitSource], few: str) -> str:
    """Shares that give the test split enough of the rows that there are, where all lie in one folder."""
    ids = [row.image_id for rows in splits.values() for row in rows]
    folders = {plain("", split.of) for split in layout.values()}
    for least in (2 * TEST_ROWS, TEST_ROWS):
        for share in (0.9, 0.8, 0.7, 0.6, 0.5):
            if len(folders) == 1 and least <= sum(share_of(image_id) >= share for image_id in ids) < len(ids):
                of = "" if "." in folders else f"of: {min(folders)}, "
                return f"set data.source.splits: {{train: {{{of}share: [0, {share}]}}, test: {{{of}share: [{share}, 1]}}}}"
    return f"add images to {layout[few].of!r}" if few in layout and layout[few].of != "." else "add images"


def _check_overlap(splits: Mapping[str, Sequence[RawRow]]) -> None:
    """Raises UserError for an image file that two splits take."""
    owner: dict[str, str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for name, rows in splits.items():
        for row in rows:
            if name_fault(row.file_name) is None:
                file = plain(row.folder, row.file_name)
                if (other := owner.setdefault(file, name)) != name:
                    shared.setdefault((other, name), []).append(file)
    for (one, two), files in shared.items():
        raise UserError(
            f"data.source.splits: {one} and {two} have {len(files)} images in common (first: {printable(files[0])}); "
            "give each its own folder, or shares that do not overlap."
        )


def _check_copies(splits: Mapping[str, Sequence[Row]]) -> None:
    """The same image in two splits makes evaluation look better than it is.

    Raises:
        UserError: every test image is a copy of a training image.
    """
    seen = {name: _hashes(rows) for name, rows in splits.items()}
    trained, tested = seen.get("train", np.empty(0, np.uint64)), seen.get("test", np.empty(0, np.uint64))
    if len(tested) and np.isin(tested, trained).all():
        raise UserError(
            "data.source: every image of the split 'test' is, byte for byte, in 'train'; give the test split images of its own."
        )
    shared, earlier = 0, np.empty(0, np.uint64)
    for hashes in seen.values():
        shared += int(np.isin(hashes, earlier).sum())
        earlier = np.union1d(earlier, hashes)
    if shared:
        log.warning("%d images are, byte for byte, in more than one split: metrics on held-out splits will flatter", shared)


def _hashes(rows: Sequence[Row]) -> np.ndarray:
    """64 bits of each row's sha256: eight bytes a row, and in 12 million rows two are equal by chance once in 250,000 data sets."""
    return np.fromiter((int(row.sha256[:16], 16) for row in rows), np.uint64, len(rows))


def _warn_of_crowds(name: str, rows: Sequence[RawRow]) -> None:
    instances = [i for row in rows for i in row.instances if isinstance(i, dict)]
    if instances and all(i.get("iscrowd") for i in instances):
        log.warning(
            "split %r: all of its %d masks are crowds, so segmentation feedback and the segmenter cannot use it", name, len(instances)
        )
