"""Reader of plain image folders with captions in ``.txt`` side files or one ``.jsonl`` (Hugging Face's imagefolder included).

Every file below the root is used, or reported with a reason. Hidden files (a dot at the start) are counted in the log only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from hypersd_pipeline.data.config import FolderSource, SplitSource
from hypersd_pipeline.data.reading import (
    MAX_TEXT,
    BadFile,
    decode_text,
    inside,
    is_text,
    lines_of,
    name_fault,
    parse_line,
    plain,
    printable,
    read_inside,
)
from hypersd_pipeline.data.rows import RawRow, Rejected
from hypersd_pipeline.errors import UserError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp"}
OTHER_IMAGES = {
    *(".avif", ".avifs", ".tif", ".tiff", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".psd", ".ico", ".eps", ".pdf"),
    *(".tga", ".exr", ".hdr", ".ppm", ".pgm", ".pbm", ".pnm", ".dng", ".cr2", ".nef", ".arw", ".raw", ".apng", ".dds", ".pcx"),
}
FILE_KEYS = ("file_name", "file", "image")
TEXT_KEYS = ("text", "caption", "captions")
NAMES = ("train", "val", "test")


def folder_splits(source: FolderSource, root: Path) -> dict[str, SplitSource]:
    """The configured splits. Else subfolders train, val, test. Else 90 : 5 : 5 by hash.

    Raises:
        UserError: ``root`` is no folder or cannot be read, or has a subfolder for testing and none for training.
    """
    try:
        os.scandir(root).close()
    except (OSError, ValueError) as error:
        reason = f"cannot be read ({printable(str(error), 80)})" if os.path.isdir(root) else "is not a folder"
        raise UserError(f"data.source.root: {printable(str(root))} {reason}; give the folder that holds the images.") from None
    if source.splits is not None:
        return source.splits
    named = {name: SplitSource(of=name) for name in NAMES if os.path.isdir(root / name)}
    if "train" in named:
        return named
    if named:
        raise UserError(
            f"data.source.root: {root} has {' and '.join(named)} but no subfolder train; add it, or name the splits in data.source.splits."
        )
    return {"train": SplitSource(share=(0.0, 0.9)), "val": SplitSource(share=(0.9, 0.95)), "test": SplitSource(share=(0.95, 1.0))}


def read_folder(source: FolderSource, root: Path, split: str) -> Iterator[RawRow | Rejected]:
    """Rows of one subfolder ("." for the root itself), sorted by file name, or in the order of the ``.jsonl``. Then what is left over.

    Raises:
        UserError: the folder is missing or a link leads out of the root, or it is not clear which ``.jsonl`` holds the captions.
    """
    folder = root / split
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is missing; check root and splits under data.source.")
    if not inside(root, folder):
        raise UserError(f"{folder} is a link that leads out of {root}; give data.source.root the folder that holds the images.")
    captions = _captions_file(source, folder)
    return _from_text(root, split) if captions is None else _from_jsonl(root, split, captions)


def strays(root: Path, splits: Mapping[str, SplitSource]) -> Iterator[Rejected]:
    """What lies below the root but in no split's folder: each file of the root itself, and each other folder with its number of files."""
    taken = [PurePosixPath(plain("", split.of)).parts for split in splits.values()]
    if () in taken:
        return
    yield from _strays(root, PurePosixPath(), taken)


def _strays(root: Path, at: PurePosixPath, taken: list[tuple[str, ...]]) -> Iterator[Rejected]:
    names = f"no split ({', '.join(sorted({'/'.join(parts) for parts in taken}))})"
    for entry in sorted(os.scandir(root / at), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        path = at / entry.name
        if path.parts in taken:
            continue
        if any(parts[: len(path.parts)] == path.parts for parts in taken) and entry.is_dir():
            yield from _strays(root, path, taken)
        elif entry.is_dir(follow_symlinks=False):
            count = sum(len(files) for _, _, files in os.walk(entry.path))
            if count:
                yield Rejected(path.as_posix(), entry.name, f"the folder is in {names}; its {count} files are not used")
        else:
            yield Rejected(path.as_posix(), entry.name, f"the file is in {names}")


def _captions_file(source: FolderSource, folder: Path) -> str | None:
    if source.captions is not None:
        if not (folder / source.captions).exists():
            raise UserError(f"{folder / source.captions} is missing; check data.source.captions.")
        return source.captions
    found = sorted(path.name for path in folder.glob("*.jsonl") if is_text(path.name))
    if "metadata.jsonl" in found:
        return "metadata.jsonl"
    if len(found) > 1:
        raise UserError(f"{folder} has several caption files ({', '.join(found)}); name one in data.source.captions.")
    return found[0] if found else None


def _files(folder: Path) -> list[str]:
    """Names of all files below a folder, with ``/``. Folders named like images, links to folders and unreadable folders are among them."""
    found: list[Path] = []
    hidden = 0
    unreadable: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=unreadable.append):
        hidden += sum(name.startswith(".") for name in (*files, *folders))
        folders[:] = [name for name in folders if not name.startswith(".")]
        odd = [name for name in folders if _suffix(name) in (*IMAGE_SUFFIXES, ".txt") or os.path.islink(os.path.join(parent, name))]
        found += [Path(parent, name) for name in (*files, *odd) if not name.startswith(".")]
    found += [Path(error.filename) for error in unreadable if error.filename != str(folder)]
    if hidden:
        log.info("%s: %d hidden files or folders are not read", folder, hidden)
    return [path.relative_to(folder).as_posix() for path in sorted(set(found))]


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _left_over(folder: Path, name: str, captions: str | None, images: set[str]) -> str:
    """Why a file that no row uses is not used.

    Args:
        captions: name of the ``.jsonl``, if there is one. images: stems of the images in the folder.
    """
    suffix = _suffix(name)
    if not is_text(name):
        return "the file name is no valid UTF-8"
    if (folder / name).is_dir():
        return "it is a link to a folder, which is not followed" if (folder / name).is_symlink() else "it is a folder and no file"
    if suffix in OTHER_IMAGES:
        return f"{suffix} files are not read; convert it to PNG, JPEG, WebP or BMP"
    if captions is not None:
        if suffix in IMAGE_SUFFIXES:
            return f"no line of {captions} names the image"
        return f"it is no image, and the captions are read from {captions}"
    if suffix != ".txt":
        return "it is no image and no caption file"
    return "its image is not used" if name[:-4] in images else "there is no image beside this caption file"


def _from_jsonl(root: Path, split: str, captions: str) -> Iterator[RawRow | Rejected]:
    file = plain(split, captions)
    try:
        lines = lines_of(root, file)
    except BadFile as fault:
        raise UserError(f"{root / file}: {fault}; mend it, or check data.source.captions.") from None
    first: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(lines, 1):
        label = f"line {number}"
        if not line.strip():
            continue
        try:
            record = parse_line(line)
        except BadFile as fault:
            yield Rejected(file, label, str(fault))
            continue
        name = next((record[key] for key in FILE_KEYS if key in record), None)
        if not isinstance(name, str) or not name:
            yield RawRow(label, label, split, None, _texts(record))
            continue
        if name_fault(name):
            yield RawRow(label, name, split, name, _texts(record))
            continue
        written, at = first.setdefault(plain("", name), (name, label))
        if written != name:
            yield Rejected(file, label, f"{printable(name)} is the same file as {printable(written)} ({at})")
            continue
        yield RawRow(label, name, split, name, _texts(record))
    for name in _files(root / split):
        if name not in first and plain(split, name) != file:
            yield Rejected(printable(plain(split, name)), printable(name), _left_over(root / split, name, captions, set()))


def _texts(record: dict[str, Any]) -> list[Any]:
    value = next((record[key] for key in TEXT_KEYS if key in record), None)
    return value if isinstance(value, list) else [value]


def _from_text(root: Path, split: str) -> Iterator[RawRow | Rejected]:
    names = _files(root / split)
    images = [name for name in names if _suffix(name) in IMAGE_SUFFIXES and is_text(name)]
    used = {_side(name) for name in images}
    stems = {str(PurePosixPath(name).with_suffix("")) for name in names if _suffix(name) in (*IMAGE_SUFFIXES, *OTHER_IMAGES)}
    there = set(names)
    for name in images:
        file, side = plain(split, name), _side(name)
        if side not in there:
            yield Rejected(file, name, f"there is no caption file {PurePosixPath(side).name}")
            continue
        try:
            text = decode_text(read_inside(root, plain(split, side), MAX_TEXT))
        except BadFile as fault:
            yield Rejected(file, name, _side_fault(PurePosixPath(side).name, str(fault)))
        else:
            yield RawRow(name, name, split, name, [line for line in text.splitlines() if line.strip()] or [""])
    for name in names:
        if name not in used and not (_suffix(name) in IMAGE_SUFFIXES and is_text(name)):
            yield Rejected(printable(plain(split, name)), printable(name), _left_over(root / split, name, None, stems))


def _side(name: str) -> str:
    return PurePosixPath(name).with_suffix(".txt").as_posix()


def _side_fault(name: str, fault: str) -> str:
    return f"the caption file {name} {fault}; save it as UTF-8" if fault.startswith("is ") else f"the caption file {name}: {fault}"
