"""Tar shards for tests: samples in webdataset's layout, and tars with every fault."""

from __future__ import annotations

import functools
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def image(seed: int, size: tuple[int, int] = (24, 16), kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng([seed, *size]).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def sample(key: str, seed: int, size: tuple[int, int] = (24, 16), **meta: Any) -> list[tuple[str, bytes]]:
    """The three files of a sample, as img2dataset orders them."""
    files = [(f"{key}.jpg", image(seed, size)), (f"{key}.json", json.dumps({"key": key, **meta}).encode())]
    return [*files, (f"{key}.txt", f"caption of {key}".encode())]


def write_tar(path: Path, files: list[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as tar:
        for file in files:
            if isinstance(file, tarfile.TarInfo):
                tar.addfile(file)
            else:
                info = tarfile.TarInfo(file[0])
                info.size = len(file[1])
                tar.addfile(info, io.BytesIO(file[1]))
    return path


def shards(root: Path, count: int = 3, rows: int = 8) -> Path:
    """``00000.tar`` and so on. Sample ``i`` has the scores ``aesthetic: i`` and ``pwatermark: i / 10``."""
    for shard in range(count):
        files: list[Any] = []
        for i in range(rows):
            files += sample(f"{shard:05d}{i:04d}", shard * 100 + i, aesthetic=i, pwatermark=i / 10, similarity=0.3)
        write_tar(root / f"{shard:05d}.tar", files)
    return root


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that answers Range requests, as S3 and most web servers do."""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            super().do_GET()
            return
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        content = path.read_bytes()[first : last + 1]
        self.server.parts += 1  # type: ignore[attr-defined]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


class _Plain(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(root: Path, ranges: bool = True) -> Iterator[Any]:
    """A real HTTP server on a folder. Its ``address``, and ``parts``: how many Range requests it answered."""
    handler = functools.partial(_Ranges if ranges else _Plain, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.parts, server.address = 0, f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
