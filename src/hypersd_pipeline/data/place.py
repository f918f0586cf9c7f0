"""Where shards lie: a folder of this machine, S3 or HTTP. Nothing here runs a shell or unpacks an archive."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from hypersd_pipeline.data.reading import BadFile, file_fault, printable
from hypersd_pipeline.errors import UserError

SCHEMES = {"s3": ("s3fs", "s3"), "http": ("aiohttp", "data"), "https": ("aiohttp", "data")}  # -> fsspec's package, and our extra with it
HASHES, TIMES = ("ETag", "etag"), ("mtime", "LastModified", "Last-Modified")  # what tells that a file is still the same
LARGEST = 2**50  # bytes of a shard
GAP, SPAN = 2**20, 2**26  # bytes: smaller gaps are read through, and so much at once


def scheme_of(root: str) -> str | None:
    """``s3``, ``https`` and so on. None for a folder of this machine."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(//|:)?", root)
    return match[1].lower() if match and (match[2] or match[1].lower() == "pipe") else None


def root_fault(root: str) -> str | None:
    """What is wrong with the address of a folder of shards. None if nothing is."""
    scheme = scheme_of(root)
    if scheme == "pipe":
        return "is a pipe: address, which runs a command; give a folder, or an s3://, http:// or https:// address"
    if scheme is None:
        return None
    if scheme not in SCHEMES or "::" in root:
        return f"has the scheme {scheme!r}, which is not read; give a folder, or an s3://, http:// or https:// address"
    host = root.partition("://")[2].partition("/")[0]
    if not host or "@" in host or "?" in root or "#" in root:
        return "is no address of a folder without password and query; put secrets into the environment's variables"
    return None


class Place:
    """A folder of files, which may be far away.

    Args:
        root: a folder, or an address that `root_fault` has no objection to.

    Raises:
        UserError: the package that reads such addresses is missing.
    """

    def __init__(self, root: str) -> None:
        self.scheme = scheme_of(root)
        self.root = root.rstrip("/") if self.scheme else str(Path(os.path.expanduser(root)).absolute())
        self._fs: Any = None
        if self.scheme:
            package, extra = SCHEMES[self.scheme]
            try:
                import fsspec

                self._fs = fsspec.filesystem(self.scheme)
            except ImportError:
                raise UserError(
                    f"data.source.root: {self.scheme}:// needs {package}; install it with pip install 'hypersd-pipeline[{extra}]'."
                ) from None
            self._fs.invalidate_cache()  # what another place in this process has listed may have changed since

    def names(self, pattern: str) -> list[str]:
        """Names of the files that fit a pattern with ``*``, sorted.

        Raises:
            UserError: the place cannot list its files.
        """
        if self.scheme is None:
            root = Path(self.root)
            return sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))
        if self.scheme != "s3":
            raise UserError(f"data.source: {self.scheme} cannot list files; write {pattern!r} with braces, such as {{00000..00099}}.tar.")
        start = self.root.partition("://")[2] + "/"
        with self._explained(pattern):
            return sorted(str(name).removeprefix(start) for name in self._fs.glob(f"{self.root}/{pattern}"))

    def state(self, name: str) -> dict[str, str]:
        """Size and time or hash of a file: what changes with its content.

        Raises:
            UserError: it is missing, empty or not to be had.
        """
        if self.scheme is None:
            if fault := file_fault(Path(self.root), Path(self.root, name), LARGEST):
                raise UserError(f"{self.root}/{printable(name)}: {fault}; put the file there, or correct data.source.")
            found = os.stat(Path(self.root, name))
            info: dict[str, Any] = {"size": found.st_size, "mtime": found.st_mtime_ns}
        else:
            with self._explained(name):
                info = self._fs.info(f"{self.root}/{name}")
        if info.get("size") == 0:
            raise UserError(f"{self.root}/{printable(name)} is empty; fetch the file again, or take it out of data.source.")
        known = [key for key in HASHES if info.get(key) is not None] or TIMES  # a file that is uploaded again has another time
        return {key: str(info[key]) for key in ("size", *known) if info.get(key) is not None}

    def open(self, name: str) -> BinaryIO:
        """A file from its start, as a stream. Raises OSError and the like where it cannot be read."""
        if self.scheme is None:
            return open(Path(self.root, name), "rb")
        return cast(BinaryIO, self._fs.open(f"{self.root}/{name}", "rb", **({} if self.scheme == "s3" else {"block_size": 0})))

    def read(self, name: str, start: int, size: int) -> bytes:
        """A part of a file.

        Raises:
            BadFile: it cannot be read, or is not there.
        """
        try:
            if self.scheme is None:
                if fault := file_fault(Path(self.root), Path(self.root, name), LARGEST):
                    raise BadFile(fault)
                with open(Path(self.root, name), "rb") as file:
                    content = os.pread(file.fileno(), size, start)
            else:
                content = self._fs.cat_file(f"{self.root}/{name}", start=start, end=start + size)
        except BadFile:
            raise
        except Exception as error:  # each file system has classes of its own
            raise BadFile(f"the shard cannot be read ({reason_of(error)})") from None
        if len(content) != size:
            raise BadFile(f"{len(content)} bytes came where {size} were asked for")
        return content

    def check_parts(self, name: str) -> None:
        """Raises UserError for a server that gives no parts of a file: latents need single images of a shard."""
        if self.scheme is None:
            return
        try:
            self.read(name, 0, 512)
        except BadFile as fault:
            raise UserError(
                f"{self.root}/{printable(name)}: the server gives no parts of a file ({fault}); "
                "copy the shards to a disk, to S3 or to a server that answers Range requests."
            ) from None

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        where = f"{self.root}/{printable(name)}"
        try:
            yield
        except FileNotFoundError as error:
            reason = f" ({reason_of(error.__cause__)})" if error.__cause__ else ""  # fsspec says so of a server that does not answer too
            raise UserError(f"{where} is missing or cannot be reached{reason}; put the file there, or correct data.source.") from None
        except Exception as error:  # no network, no rights, no such host
            raise UserError(f"{where} cannot be reached ({reason_of(error)}); check data.source.root, network and rights.") from None


def reason_of(error: BaseException) -> str:
    """An exception on one line."""
    return printable(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, 120)


def spans(parts: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Parts ``(start, size)`` of one file put together where little lies between them: what to read at once."""
    at, end = -1, -1
    for start, size in sorted(parts):
        if at >= 0 and start - end <= GAP and start + size - at <= SPAN:
            end = max(end, start + size)
            continue
        if at >= 0:
            yield at, end - at
        at, end = start, start + size
    if at >= 0:
        yield at, end - at
