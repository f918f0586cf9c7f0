"""Rows of a data set: as read, as refused, and as accepted into the manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hypersd_pipeline.data.reading import is_split_name, name_fault, shown
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import replacing_folder, sha256_of, write_text


@dataclass(frozen=True)
class RawRow:
    """A row as its source states it, before any check.

    Attributes:
        label: where it stands in the source, for the table of refused rows ("image 139", "line 7").
        folder, file_name: the images' folder inside the root, and the name inside that folder.
        captions: as found, of any type. size: stated (width, height), if any. instances: COCO annotations.
    """

    label: str
    image_id: str
    folder: str
    file_name: Any
    captions: Sequence[Any]
    size: tuple[Any, Any] | None = None
    instances: Sequence[Any] = ()


@dataclass(frozen=True)
class Rejected:
    """A row, or a caption of a row, that was left out."""

    file: str
    row: str
    reason: str


@dataclass(frozen=True)
class Row:
    """A good row of the manifest. ``file`` is relative to the data set's root. ``sha256`` is of the file's bytes."""

    image_id: str
    file: str
    captions: tuple[str, ...]
    width: int
    height: int
    n_instances: int
    sha256: str

    def digest(self) -> str:
        """sha256 of everything in the row."""
        return sha256_of(asdict(self))


@dataclass(frozen=True)
class Manifest:
    """The good rows of every split, and the folder that their files are in."""

    root: Path
    splits: dict[str, tuple[Row, ...]] = field(default_factory=dict)

    def path(self, row: Row) -> Path:
        """The image file of a row."""
        return self.root / row.file

    @cached_property
    def key(self) -> str:
        """sha256 of all rows, image bytes included. The same wherever the folder lies."""
        return sha256_of({name: [row.digest() for row in rows] for name, rows in self.splits.items()})


def share_of(image_id: str) -> float:
    """A number in [0, 1) that depends on the id only: what splits by hash compare."""
    return int.from_bytes(hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).digest()[:7], "big") / 2**56


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``<split>.jsonl`` per split and ``root.json``. The folder is replaced as a whole.

    A root in the project's data folder, two levels up, is stored as a relative path: the files do not depend on where the project lies.

    Raises:
        ValueError: a file cannot be named after a split.
    """
    root = manifest.root.absolute()
    if root.is_relative_to(folder.absolute().parents[1]):
        root = Path(os.path.relpath(root, folder.absolute()))
    with replacing_folder(folder) as part:
        for name, rows in manifest.splits.items():
            with open(part / f"{_split_name(name)}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
        write_text(part / "root.json", json.dumps({"root": root.as_posix(), "splits": list(manifest.splits)}, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read what :func:`write_manifest` wrote.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    try:
        head = json.loads((folder / "root.json").read_text(encoding="utf-8"))
        splits = {name: tuple(_rows(folder / f"{_split_name(name)}.jsonl")) for name in head["splits"]}
        root = Path(os.path.normpath(folder / head["root"]))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; run data_prep first (kedro run --pipelines data_prep).") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{folder}: the manifest is damaged ({error}); run data_prep again (kedro run --pipelines data_prep).") from None
    return Manifest(root, splits)


def _split_name(name: Any) -> str:
    if not is_split_name(name):
        raise ValueError(f"a split is named {shown(name)}")
    return str(name)


def _rows(path: Path) -> Iterable[Row]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            values = json.loads(line)
            row = Row(**{**values, "captions": tuple(values["captions"])})
            texts = (row.image_id, row.file, row.sha256, *row.captions)
            numbers = (row.width, row.height, row.n_instances)
            if not (row.captions and all(type(text) is str for text in texts) and all(type(number) is int for number in numbers)):
                raise TypeError(f"{path.name} has a row of another form")
            if fault := name_fault(row.file):
                raise ValueError(fault)
            yield row
