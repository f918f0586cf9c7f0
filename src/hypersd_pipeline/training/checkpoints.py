"""Checkpoints from which a run continues bit for bit. Tensors and plain containers only, loaded with ``weights_only=True``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import file_sha256, fingerprint, lock, replacing_file, write_text

log = logging.getLogger(__name__)

IDENTITY, PROGRESS = "identity.json", "progress.json"
_DIGITS = 12  # of the content's sha256, in a checkpoint's name


@dataclass(frozen=True)
class Made:
    """What a folder of checkpoints holds: the identity that they were made under, and the newest of them.

    Attributes:
        key: the folder's name. identity: see `Identity`. step: updates done. seconds: of training that it took.
    """

    key: str
    identity: Mapping[str, Any]
    step: int
    seconds: float


@dataclass(frozen=True)
class Identity:
    """All that trained weights depend on: configuration, teacher, data, judges, start. Anything that JSON can write.

    Checkpoints are kept under its ``key``. The parts themselves are written beside them, so that a later run can say what is different.
    """

    parts: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A short hash of the parts."""
        return fingerprint(dict(self.parts))


class CheckpointStore:
    """The newest checkpoints of one training stage, in a folder per identity (`Identity.key`).

    A changed configuration starts anew beside the old checkpoints: a short trial never destroys a long training, and going back to the old
    configuration continues it. A checkpoint's name carries the hash of its content, so that a damaged one is seen and passed over.

    Args:
        path: the stage's folder. Created on the first save.
        keep: how many checkpoints of a key stay.
        restart: even a long training under another key may be left behind without asking (see `training.resume`).
    """

    def __init__(self, path: Path | str, keep: int = 2, restart: bool = False) -> None:
        self.path, self.keep, self.restart = Path(path), keep, restart

    def _files(self, key: str) -> list[Path]:
        return sorted((self.path / key).glob("step-*.pt"), key=lambda file: (_step_of(file), file.stat().st_mtime_ns))

    def save(self, step: int, key: str, state: dict[str, Any], identity: Identity | None = None) -> None:
        """Write atomically: a kill in the middle leaves the previous checkpoint."""
        folder = self.path / key
        unnamed = folder / "unnamed"
        with replacing_file(unnamed) as temporary, open(temporary, "wb") as file:  # a path's name would become part of the content
            torch.save({"step": step, "key": key, "state": state}, file)
        if identity is not None and not (folder / IDENTITY).exists():
            write_text(folder / IDENTITY, json.dumps(dict(identity.parts), indent=1, sort_keys=True, default=str) + "\n")
        target = folder / f"step-{step:08d}-{file_sha256(unnamed)[:_DIGITS]}.pt"
        unnamed.replace(target)
        write_text(folder / PROGRESS, json.dumps({"step": step, "seconds": state.get("seconds", 0.0)}) + "\n")
        for old in (file for file in self._files(key) if _step_of(file) == step and file != target):  # before a rollback
            old.unlink()
        for old in self._files(key)[: -self.keep]:
            old.unlink()

    def locked(self, name: str) -> AbstractContextManager[None]:
        """Keep other processes from training the same stage. Raises UserError, with the process that does."""
        return lock(self.path / ".lock", name)

    def discard_after(self, key: str, step: int) -> None:
        """Delete the key's checkpoints of later steps."""
        for file in self._files(key):
            if _step_of(file) > step:
                file.unlink()

    def load(
        self, key: str, map_location: str | torch.device = "cpu", accept: Callable[[dict[str, Any]], bool] = lambda state: True
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest readable checkpoint made under ``key`` that ``accept`` takes: ``(step, state)``, or None.

        A damaged file is passed over for the one before it. ``accept`` may raise for a state of another form, which counts as damage.

        Raises:
            UserError: every checkpoint of the key is damaged.
        """
        files, damaged = self._files(key), 0
        for file in reversed(files):
            try:
                step, state = _read(file, map_location)
                accepted = accept(state)
            except Exception as error:  # unpickling raises whatever the bytes provoke
                log.warning("%s: damaged checkpoint passed over (%s)", file, _reason(error))
                damaged += 1
                continue
            if accepted:
                return step, state
        if files and damaged == len(files):
            raise UserError(
                f"{self.path / key}: none of its {len(files)} checkpoints can be read; delete the folder to start the stage anew."
            )
        return None

    def others(self, key: str) -> Iterator[Made]:
        """What was trained under other keys, the most updates first. Folders without a readable identity are left out."""
        found = []
        for folder in self.path.iterdir() if self.path.is_dir() else ():
            files = self._files(folder.name)
            if folder.name == key or not files:
                continue
            try:
                identity, progress = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (IDENTITY, PROGRESS))
                found.append(Made(folder.name, identity, _step_of(files[-1]), float(progress["seconds"])))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        yield from sorted(found, key=lambda made: made.step, reverse=True)


def superfluous(folder: Path) -> list[Path]:
    """What is not needed to continue: of each stage below ``folder`` all folders of identities but the newest, and all checkpoints in it
    but the newest.
    """
    found: list[Path] = []
    for stage in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        files = sorted(stage.glob("*/step-*.pt"), key=lambda file: file.stat().st_mtime_ns)
        if files:
            newest = files[-1]
            found += sorted(key for key in stage.iterdir() if key.is_dir() and key != newest.parent)
            found += [file for file in files if file.parent == newest.parent and file != newest]
    return found


def _step_of(file: Path) -> int:
    return int(file.stem.split("-")[1])


def _read(file: Path, map_location: str | torch.device) -> tuple[int, dict[str, Any]]:
    _, _, digest = file.stem.partition("-")[2].partition("-")
    if digest and not file_sha256(file).startswith(digest):
        raise ValueError("its content has another hash than its name says")
    data = torch.load(file, map_location=map_location, weights_only=True)
    if not isinstance(data, dict) or not isinstance(data.get("step"), int) or not isinstance(data.get("state"), dict):
        raise ValueError("it has another form")
    return data["step"], data["state"]


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) and str(error).startswith("it") else type(error).__name__
