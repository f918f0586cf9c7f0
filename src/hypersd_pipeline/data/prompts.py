"""Captions without images, from one file: a caption a line, or a column of a .jsonl or .parquet file."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

from hypersd_pipeline.data.config import PromptsSource, SplitSource
from hypersd_pipeline.data.lines import Lines
from hypersd_pipeline.data.reading import MAX_TEXT, BadFile, decode_text, file_fault, is_text, parse_line, printable
from hypersd_pipeline.data.rows import Rejected, Row, parse_row, share_of
from hypersd_pipeline.errors import UserError

LARGEST = 2**50  # bytes of the file, of which a line is in memory at a time
LISTED = 1000  # faults that are listed one by one. The others are counted


def prompt_splits(source: PromptsSource) -> dict[str, SplitSource]:
    """Which share of the captions each split has."""
    return source.splits or {
        "train": SplitSource(share=(0.0, 0.9)),
        "val": SplitSource(share=(0.9, 0.95)),
        "test": SplitSource(share=(0.95, 1.0)),
    }


def check_prompts(source: PromptsSource) -> tuple[dict[str, Lines[Row]], list[Rejected]]:
    """Read all captions. A caption that stands there twice is used once.

    Returns:
        The rows of each split, which lie on the disk, and what was left out. A row's width, height and image are none.

    Raises:
        UserError: the file is missing, of another kind, or has no such column.
    """
    path, layout = Path(os.path.expanduser(source.file)).absolute(), prompt_splits(source)
    files = {name: cast(BinaryIO, tempfile.TemporaryFile()) for name in layout}
    starts = {name: array("q", [0]) for name in layout}
    seen: set[bytes] = set()
    listed: list[Rejected] = []
    counts: Counter[str] = Counter()
    for label, value in _values(path, source.column):
        if isinstance(value, str) and is_text(value) and value.strip() and len(value) <= MAX_TEXT:
            caption = value.strip()
            digest = sha256(caption.encode())
            if digest.digest()[:16] in seen:
                counts["the caption stands there before"] += 1
                continue
            seen.add(digest.digest()[:16])
            key = digest.hexdigest()
            row, share = Row(key[:32], path.name, (caption,), 0, 0, 0, key), share_of(key[:32])
            for name, split in layout.items():
                if split.share[0] <= share < split.share[1]:
                    starts[name].append(starts[name][-1] + files[name].write(row.line()))
        elif len(listed) < LISTED:
            listed.append(Rejected(path.name, label, str(value) if isinstance(value, BadFile) else _fault(value)))
        else:
            counts["further faults, which are not listed one by one"] += 1
    for file in files.values():
        file.flush()
    reports = [*listed, *(Rejected(path.name, f"{count} rows", reason) for reason, count in counts.items())]
    return {name: Lines(files[name], parse_row, starts[name]) for name in layout}, reports


def _fault(value: Any) -> str:
    if not isinstance(value, str):
        return "the caption is no text"
    if not value.strip():
        return "the caption is empty"
    return f"the caption has more than {MAX_TEXT} characters" if is_text(value) else "the caption has a lone surrogate, which is no text"


def _values(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """What stands in each line or row, with a name for it. A line that cannot be read is a `BadFile`."""
    if fault := file_fault(path.parent, path, LARGEST):
        raise UserError(f"data.source.file: {printable(str(path))}: {fault}; give a .txt, .jsonl or .parquet file.")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, column)
    elif suffix in (".txt", ".jsonl"):
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_TEXT + 2):
                number += 1
                while len(line) > MAX_TEXT and not line.endswith(b"\n") and (more := file.readline(MAX_TEXT)):
                    line = line[: MAX_TEXT + 1] + more[-1:]
                if line.strip():
                    yield f"line {number}", _line(line, column if suffix == ".jsonl" else None)
    else:
        raise UserError(
            f"data.source.file: {printable(str(path))} is a {suffix or 'file without suffix'}; give a .txt, .jsonl or .parquet file."
        )


def _line(line: bytes, column: str | None) -> Any:
    try:
        if len(line) > MAX_TEXT:
            raise BadFile(f"the line has more than {MAX_TEXT} bytes")
        if column is None:
            return decode_text(line)
        record = parse_line(line.removeprefix(b"\xef\xbb\xbf"))
        if column not in record:
            raise BadFile(f"the line has no key {column!r}")
        return record[column]
    except BadFile as fault:
        return BadFile(f"the line {fault}") if str(fault).startswith("is ") else fault


def _parquet(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"data.source.file: {path} needs pyarrow; install it with pip install pyarrow.") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                names = printable(", ".join(file.schema_arrow.names), 200)
                raise UserError(f"data.source.column: {path} has no column {column!r} but {names}; name one of them.")
            for batch in file.iter_batches(columns=[column], batch_size=4096):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"row {number}", value
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.source.file: {path} is damaged or no parquet file ({printable(str(error), 120)}); fetch it again.") from None
