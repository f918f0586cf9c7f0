"""Reading a user's files: regular files inside the root only, of a bounded size, and text in UTF-8 only."""

from __future__ import annotations

import codecs
import json
import os
import re
import reprlib
import stat
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

MAX_TEXT = 2**20  # bytes of a caption file or of a line of a .jsonl
MAX_JSON = 2**32  # bytes of an annotation file. COCO2017's largest has half a gigabyte
NESTED = "it is nested too deeply"

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class BadFile(ValueError):
    """A file, a name or a text that is not accepted. The message is the reason, without the name of the file."""


# --- names -------------------------------------------------------------------------------------------------------------------------------


def is_text(value: str) -> bool:
    """Whether the text can be written as UTF-8: lone surrogates, which JSON and file names may hold, cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(value: str, limit: int = 300) -> str:
    """The text on one line, with what is no text written as escapes, cut to ``limit`` characters."""
    line = " ".join(value.encode("utf-8", "backslashreplace").decode().split("\n")).replace("\0", "\\0")
    return line if len(line) <= limit else f"{line[:limit]}..."


def shown(value: Any) -> str:
    """A value of any type and size for a message."""
    return printable(value if isinstance(value, str) else reprlib.repr(value), 80)


def name_fault(name: Any) -> str | None:
    """What is wrong with the name of a file inside a folder. None if nothing is."""
    if not isinstance(name, str) or not name.strip():
        return "the row names no file"
    if not is_text(name):
        return "the file name is no valid UTF-8"
    return "the file name leads out of the images' folder" if leads_out(name) else None


def leads_out(name: str) -> bool:
    """Whether a path is absolute or has ``..`` in it, in the writing of any system."""
    windows = PureWindowsPath(name)  # understands both kinds of slash, and drives
    return name.startswith("/") or bool(windows.anchor) or ".." in windows.parts or "\0" in name


def is_split_name(name: Any) -> bool:
    """Whether files can be named after a split: letters, digits, ``_``, ``-`` and ``.``, but no ``.`` at the start."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name) is not None


# --- files -------------------------------------------------------------------------------------------------------------------------------


def inside(root: Path, path: Path) -> bool:
    """Whether a path lies in ``root`` after all symbolic links are followed."""
    base, real = os.path.realpath(root), os.path.realpath(path)
    return real == base or real.startswith(os.path.join(base, ""))


def file_fault(root: Path, path: Path, limit: int) -> str | None:
    """Why a file is not read, without opening it. None if it may be.

    Args:
        root: the folder that no link may lead out of. limit: bytes that it may have.
    """
    try:
        found = os.stat(path)
        if not inside(root, path):
            return "the file is a link that leads out of the root; copy it"
    except (FileNotFoundError, NotADirectoryError):
        return "the file is missing"
    except ValueError:  # surrogates that are no bytes of a name, zero bytes
        return "the file name is no valid UTF-8"
    except OSError as error:
        return f"the file cannot be opened ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS if test(found.st_mode)), "something else")
        return f"it is no regular file but {kind}"
    if found.st_size > limit:
        return f"the file has {found.st_size} bytes, {limit} at most are read"
    return None


def read_inside(root: Path, file: PurePath | str, limit: int) -> bytes:
    """The content of a file below ``root``.

    Raises:
        BadFile: it is missing, no regular file, too large or unreadable, or a link leads out of ``root``.
    """
    path = root / file
    if fault := file_fault(root, path, limit):
        raise BadFile(fault)
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile(f"the file cannot be opened ({error.strerror})") from None


# --- text --------------------------------------------------------------------------------------------------------------------------------


def encoding_fault(content: bytes) -> str | None:
    """What encoding the bytes are in where it is not UTF-8: "UTF-16, not UTF-8". None where it is."""
    for mark, name in _MARKS:
        if content.startswith(mark):
            return f"{name}, not UTF-8"
    if b"\0" in content:
        return "UTF-16 without a byte order mark, or no text at all"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8 text but perhaps Latin-1 or Windows-1252"
    return None


def decode_text(content: bytes) -> str:
    """UTF-8 as text, without the byte order mark.

    Raises:
        BadFile: "is UTF-16, not UTF-8" and the like.
    """
    if fault := encoding_fault(content):
        raise BadFile(f"is {fault}")
    return content.decode("utf-8-sig")


def parse_json(text: str) -> Any:
    """A JSON value.

    Raises:
        BadFile: it is none, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise BadFile(NESTED) from None
    except ValueError as error:
        raise BadFile(str(error)) from None


def parse_line(line: bytes) -> dict[str, Any]:
    """A line of a ``.jsonl`` file.

    Raises:
        BadFile: it is no JSON object in UTF-8.
    """
    if len(line) > MAX_TEXT:
        raise BadFile(f"the line has more than {MAX_TEXT} bytes")
    if fault := encoding_fault(line):
        raise BadFile(f"the line is {fault}")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise BadFile("the line is no JSON object")
    return record


def lines_of(root: Path, file: PurePath | str) -> list[bytes]:
    """The lines of a ``.jsonl`` file below ``root``, without a byte order mark.

    Raises:
        BadFile: the file cannot be read, or is UTF-16 or UTF-32.
    """
    content = read_inside(root, file, MAX_JSON)
    for mark, name in _MARKS:
        if content.startswith(mark):
            raise BadFile(f"the file is {name}, not UTF-8; save it as UTF-8")
    return content.removeprefix(codecs.BOM_UTF8).splitlines()


def plain(folder: str, name: str) -> str:
    """``folder/name`` without ``.`` and doubled slashes."""
    return PurePosixPath(os.path.normpath(PurePosixPath(folder) / name)).as_posix()
