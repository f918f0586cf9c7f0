"""Reader of plain image folders with captions in ``.txt`` side files or one ``.jsonl`` (Hugging Face's imagefolder included)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from hypersd_pipeline.data.config import FolderSource, SplitSource
from hypersd_pipeline.data.rows import RawRow, Rejected
from hypersd_pipeline.errors import UserError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FILE_KEYS = ("file_name", "file", "image")
TEXT_KEYS = ("text", "caption", "captions")


def folder_splits(source: FolderSource, root: Path) -> dict[str, SplitSource]:
    """The configured splits; else subfolders train, val, test; else 90 : 5 : 5 by hash.

    Raises:
        UserError: ``root`` is no folder.
    """
    if not root.is_dir():
        raise UserError(f"data.source.root: {root} is not a folder; give the folder that holds the images.")
    if source.splits is not None:
        return source.splits
    named = {name: SplitSource(of=name) for name in ("train", "val", "test") if (root / name).is_dir()}
    if "train" in named:
        return named
    return {"train": SplitSource(share=(0.0, 0.9)), "val": SplitSource(share=(0.9, 0.95)), "test": SplitSource(share=(0.95, 1.0))}


def read_folder(source: FolderSource, root: Path, split: str) -> Iterator[RawRow | Rejected]:
    """Rows of one subfolder ("." for the root itself), sorted by file name, or in the order of the ``.jsonl``.

    Raises:
        UserError: the folder is missing, or it is not clear which ``.jsonl`` holds the captions.
    """
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; check root and splits under data.source.")
    captions = _captions_file(source, folder)
    return _from_text(folder, split) if captions is None else _from_jsonl(captions, split)


def _captions_file(source: FolderSource, folder: Path) -> Path | None:
    if source.captions is not None:
        if not (folder / source.captions).is_file():
            raise UserError(f"{folder / source.captions} is missing; check data.source.captions.")
        return folder / source.captions
    found = sorted(folder.glob("*.jsonl"))
    if (folder / "metadata.jsonl") in found:
        return folder / "metadata.jsonl"
    if len(found) > 1:
        raise UserError(f"{folder} has several caption files ({', '.join(p.name for p in found)}); name one in data.source.captions.")
    return found[0] if found else None


def _from_jsonl(path: Path, split: str) -> Iterator[RawRow | Rejected]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                yield Rejected((PurePosixPath(split) / path.name).as_posix(), f"line {number}", "the line is no JSON object")
                continue
            name = next((record[key] for key in FILE_KEYS if key in record), None)
            yield RawRow(f"line {number}", str(name or f"line {number}"), split, name, _texts(record))


def _texts(record: dict[str, Any]) -> list[Any]:
    value = next((record[key] for key in TEXT_KEYS if key in record), None)
    return value if isinstance(value, list) else [value]


def _from_text(folder: Path, split: str) -> Iterator[RawRow | Rejected]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() not in IMAGE_SUFFIXES or any(part.startswith(".") for part in Path(name).parts):
            continue
        side = path.with_suffix(".txt")
        file = (PurePosixPath(split) / name).as_posix()
        try:
            captions = [line for line in side.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except FileNotFoundError:
            yield Rejected(file, name, f"there is no caption file {side.name}")
        except ValueError:
            yield Rejected(file, name, f"the caption file {side.name} is not UTF-8 text")
        else:
            yield RawRow(name, name, split, name, captions or [""])
