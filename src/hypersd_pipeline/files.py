"""What the project does with files, each thing once: writing them whole or not at all, telling them by hashes, finding weights.

It stands on the ground floor: of ours it imports `errors` only, and torch, safetensors and huggingface_hub not before they are needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_pipeline.errors import UserError, storage_fault

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


# --- writing -----------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses (`storage_fault`) into a sentence about `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sentence = storage_fault(error, path)
        if sentence is None:
            raise
        raise UserError(sentence) from error


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success it takes the place of `path`, on an exception it is removed.

    A reader, or the next run after a kill, sees the whole old file or the whole new one.

    Raises:
        UserError: the disk is full, the folder is read-only, or the like.
    """
    temporary = _beside(path, "tmp")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`. On success it takes the place of `path`, on an exception it is removed.

    There is no folder at `path` between two renames; a kill at that moment is made good by the next writer.

    Raises:
        UserError: the disk is full, the folder is read-only, or the like.
    """
    temporary, previous = _beside(path, "tmp"), _beside(path, "old")
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary.mkdir()
        try:
            yield temporary
            if path.exists():
                path.rename(previous)
            temporary.rename(path)
        finally:
            if previous.exists() and not path.exists():
                previous.rename(path)
            for folder in (temporary, previous):
                shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` at once, creating its folder."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file to `path` at once, creating its folder. The same content gives the same bytes."""
    from safetensors.torch import save_file

    with replacing_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        _sort_header(temporary)
        share(temporary)


def _sort_header(path: Path) -> None:
    """Bring the header of a safetensors file into the order of its keys, in place. The library writes metadata in a random order."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))} if "__metadata__" in header else {}
        text = json.dumps({**metadata, **header}, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise ValueError(f"{path}: its header has another length when it is sorted")  # the library writes JSON in another way now
        file.seek(8)
        file.write(text)


def share(path: Path) -> None:
    """Give a file the permissions of any new file. safetensors makes its files private, and data and models are shared."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """What the process takes away from the permissions of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.lstat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; a link is removed and not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left beside `path`; a folder that they had moved away and not yet replaced is put back."""
    start = f".{path.name}."
    for left in path.parent.iterdir():
        pid, _, suffix = left.name.removeprefix(start).partition(".")
        if not left.name.startswith(start) or suffix not in ("tmp", "old") or not pid.isdigit() or runs_elsewhere(int(pid)):
            continue
        if suffix == "old" and not path.exists():
            left.rename(path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def runs_elsewhere(pid: int) -> bool:
    """Whether another process has this number."""
    if pid == os.getpid():  # left by an earlier process of the same number, as in a container
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextmanager
def lock(path: Path, what: str, seconds: float = 0.0) -> Iterator[None]:
    """Keep other processes that lock `path` out. The file stays and names its last holder.

    Args:
        path: the lock file. Its folder is created.
        what: what the lock is for, for messages.
        seconds: how long to wait for another process. The log says once which one that is.

    Raises:
        UserError: another process still holds it, with its host and number.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    give_up, told = time.monotonic() + seconds, False
    with open(path, "a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                host, _, pid = file.read().partition(" ")
                holder = f"process {pid or '?'} on {host or '?'}"
                if time.monotonic() >= give_up:
                    raise UserError(f"{what}: {holder} is at it ({path} is locked), so wait until it ends or stop it.") from None
                if not told:
                    log.info("%s: waiting for %s, which is at it.", what, holder)
                    told = True
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}")
        file.flush()
        yield


# --- hashes ------------------------------------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def content_hashes(files: Iterable[Path]) -> list[str]:
    """sha256 of each file: what a training stands on may be written anew under the same name."""
    return [file_sha256(path) for path in files]


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes of tensors, in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def same_content(first: Sequence[Path], second: Sequence[Path]) -> bool:
    """Whether the files have the same content one by one. They are only read where their sizes are equal."""
    pairs = list(zip(first, second, strict=False))
    if len(first) != len(second) or any(a.stat().st_size != b.stat().st_size for a, b in pairs):
        return False
    return all(a.resolve() == b.resolve() or file_sha256(a) == file_sha256(b) for a, b in pairs)


def check_sha256(path: Path, expected: str | None, key: str | None = None) -> None:
    """Compare a file with a sha256, or with its first digits. None agrees with every file.

    Args:
        key: the configuration key that has ``sha256`` below it, for the message.

    Raises:
        UserError: the file has another sha256.
    """
    if expected is None or (found := file_sha256(path)).startswith(expected):
        return
    if key is None:
        raise UserError(f"{path}: its sha256 is {found}, not {expected}; fetch the file again, or correct sha256.")
    raise UserError(f"{key}: {path} has sha256 {found}, not {expected}; fetch the file again or correct {key}.sha256.")


def sha256_of(value: Any) -> str:
    """sha256 of a JSON-able value: the key of data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def fingerprint(*parts: Any) -> str:
    """A short hash of anything JSON can write, and of the text of anything else: what a checkpoint must agree with to be continued."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


# --- finding weights ---------------------------------------------------------------------------------------------------------------------


def find_weights(
    key: str,
    path: Path | None = None,
    *,
    repo: str | None = None,
    file: str | None = None,
    revision: str | None = None,
    sha256: str | None = None,
    beside: Sequence[str] = (),
) -> Path:
    """The local file of some weights, checked; a hub file is downloaded first.

    Args:
        key: the configuration key, for messages.
        path: a local file. It overrides ``repo``.
        repo, file, revision: a file of a hub repository. Kept in the hub's own cache.
        sha256: of the file. Checked where it is given.
        beside: names of further files that must lie in the same folder or repository.

    Raises:
        UserError: the file, or one beside it, is missing or cannot be fetched, or has another sha256.
    """
    if path is not None:
        path = path.expanduser()
        for local in (path, *(path.with_name(name) for name in beside)):
            if not local.is_file():
                raise UserError(f"{key}: {local} does not exist; put the file there, or name its place in {key}.path or {key}.repo.")
    else:
        path = [hub_file(repo or "", name, revision, key) for name in (*beside, file or "")][-1]
    check_sha256(path, sha256, key)
    return path


def hub_file(repo: str, file: str, revision: str | None, key: str) -> Path:
    """A file of a hub repository, downloaded into the hub's cache. Raises UserError where it cannot be fetched."""
    from huggingface_hub import hf_hub_download

    with _fetching(f"{key}: {file} of {repo}", f"a local file in {key}.path"):
        return Path(hf_hub_download(repo, file, revision=revision))


def hub_folder(repo: str, patterns: Sequence[str], revision: str | None, key: str, instead: str = "a local folder") -> Path:
    """The files of a hub repository that fit the patterns, downloaded into the hub's cache. Raises UserError where it cannot be fetched.

    Args:
        key: the configuration key, and ``instead``: what to give in place of the repository. For the message.
    """
    from huggingface_hub import snapshot_download

    with _fetching(f"{key}: {repo} is no local folder and", instead):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def _fetching(what: str, instead: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # offline, private, misspelt, unknown revision: huggingface_hub has a class for each, httpx some more
        raise UserError(
            f"{what} could not be fetched from the hub ({type(error).__name__}); check the spelling, the network and HF_TOKEN, "
            f"or give {instead}."
        ) from error


def address_file(address: str, sha256: str | None, key: str) -> Path:
    """The file of an https address, downloaded into PyTorch's hub folder. ``sha256``, or its first digits, is checked on the way.

    Raises:
        UserError: it cannot be fetched, or is another file.
    """
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError) as error:  # no network, no such file, or another hash
            raise UserError(f"{key}: {address} could not be fetched ({error}); check it and sha256, or give a local file.") from error
    return path
