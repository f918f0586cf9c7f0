"""Rows of a data set: as read, as refused, and as accepted into the manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hypersd_pipeline.data.lines import Lines
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
    """A good row of the manifest. ``file`` is relative to the data set's root. ``sha256`` is of the file's bytes.

    Attributes:
        inside: for an image inside a tar: the tar's name below the root, and where the image's bytes begin and how many there are.
    """

    image_id: str
    file: str
    captions: tuple[str, ...]
    width: int
    height: int
    n_instances: int
    sha256: str
    inside: tuple[str, int, int] | None = None

    def digest(self) -> str:
        """sha256 of everything in the row, but for where in a tar it lies."""
        return sha256_of(self.content())

    def content(self) -> dict[str, Any]:
        """What the row is, wherever its bytes lie."""
        values = asdict(self)
        del values["inside"]
        return values

    def line(self) -> bytes:
        """The row as a line of a JSONL file."""
        values = self.content() | ({} if self.inside is None else {"inside": self.inside})
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True)
class Manifest:
    """The good rows of every split, and the folder that their files are in.

    Attributes:
        splits: the rows of each split. They may lie on the disk, see `hypersd_pipeline.data.lines.Lines`.
        address: where the files are if not on this machine, such as ``s3://bucket/folder``. ``root`` has no meaning then.
    """

    root: Path
    splits: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    address: str | None = None

    def path(self, row: Row) -> Path:
        """The image file of a row that is a file of this machine."""
        return self.root / row.file

    def where(self, row: Row) -> str:
        """Where a row's image is, for messages."""
        return f"{self.address or self.root}/{row.file}"

    @cached_property
    def key(self) -> str:
        """sha256 of all rows, image bytes included. The same wherever the folder lies."""
        digest = hashlib.sha256(b"{")  # as `sha256_of` of {split: [digests]}, without holding the digests
        for number, (name, rows) in enumerate(sorted(self.splits.items())):
            digest.update(f"{', ' if number else ''}{json.dumps(name, ensure_ascii=False)}: [".encode())
            for position, row in enumerate(rows):
                digest.update(f'{", " if position else ""}"{row.digest()}"'.encode())
            digest.update(b"]")
        digest.update(b"}")
        return digest.hexdigest()


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
            with open(part / f"{_split_name(name)}.jsonl", "wb") as file:
                file.writelines(row.line() for row in rows)
        head: dict[str, Any] = {"root": root.as_posix(), "splits": list(manifest.splits)}
        if manifest.address is not None:
            head = {"root": manifest.address, "splits": list(manifest.splits), "remote": True}
        write_text(part / "root.json", json.dumps(head, indent=2) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read what :func:`write_manifest` wrote.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    try:
        head = json.loads((folder / "root.json").read_text(encoding="utf-8"))
        splits = {name: _rows(folder / f"{_split_name(name)}.jsonl") for name in head["splits"]}
        address = str(head["root"]) if head.get("remote") else None
        root = folder if address else Path(os.path.normpath(folder / head["root"]))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing; run data_prep first (kedro run --pipelines data_prep).") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{folder}: the manifest is damaged ({error}); run data_prep again (kedro run --pipelines data_prep).") from None
    return Manifest(root, splits, address)


def _split_name(name: Any) -> str:
    if not is_split_name(name):
        raise ValueError(f"a split is named {shown(name)}")
    return str(name)


def _rows(path: Path) -> Lines[Row]:
    """The rows of a split, which stay in the file. All are read once. Raises ValueError and the like where one is of another form."""
    return Lines(open(path, "rb"), parse_row, keep=lambda line: bool(parse_row(line)))


def parse_row(line: bytes) -> Row:
    """A row from a line that :meth:`Row.line` made.

    Raises:
        ValueError, KeyError, TypeError: it is of another form.
    """
    values = json.loads(line)
    place = values.get("inside")
    inside = None if place is None else (str(place[0]), int(place[1]), int(place[2]))
    row = Row(**{**values, "captions": tuple(values["captions"]), "inside": inside})
    texts = (row.image_id, row.file, row.sha256, *row.captions)
    numbers = (row.width, row.height, row.n_instances)
    if not (row.captions and all(type(text) is str for text in texts) and all(type(number) is int for number in numbers)):
        raise TypeError("it has a row of another form")
    if fault := name_fault(row.file) or (inside and name_fault(inside[0])):
        raise ValueError(fault)
    return row
