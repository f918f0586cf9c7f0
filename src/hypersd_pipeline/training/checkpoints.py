"""Checkpoints from which a run continues bit for bit. Tensors and plain containers only, loaded with ``weights_only=True``."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hypersd_pipeline.errors import UserError

log = logging.getLogger(__name__)


def fingerprint(*parts: Any) -> str:
    """A short hash of anything JSON can write: what a checkpoint must agree with to be continued."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def content_hashes(files: Iterable[Path]) -> list[str]:
    """sha256 of each file: what a training stands on may be written anew under the same name."""
    hashes = []
    for path in files:
        with open(path, "rb") as content:
            hashes.append(hashlib.file_digest(content, "sha256").hexdigest())
    return hashes


class CheckpointStore:
    """The newest checkpoints of one training stage, in a folder per configuration (`key`).

    A changed configuration starts anew beside the old checkpoints: a short trial never destroys a long training, and going back to the old
    configuration continues it.

    Args:
        path: the stage's folder; created on the first save.
        keep: how many checkpoints of a key stay.
    """

    def __init__(self, path: Path | str, keep: int = 2) -> None:
        self.path = Path(path)
        self.keep = keep

    def _files(self, key: str) -> list[Path]:
        return sorted((self.path / key).glob("step-*.pt"))

    def save(self, step: int, key: str, state: dict[str, Any]) -> None:
        """Write atomically: a kill in the middle leaves the previous checkpoint."""
        target = self.path / key / f"step-{step:08d}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        torch.save({"step": step, "key": key, "state": state}, temporary)
        os.replace(temporary, target)
        for old in self._files(key)[: -self.keep]:
            old.unlink()

    def discard_after(self, key: str, step: int) -> None:
        """Delete the key's checkpoints of later steps."""
        for file in self._files(key):
            if int(file.stem.removeprefix("step-")) > step:
                file.unlink()

    def load(
        self, key: str, map_location: str | torch.device = "cpu", accept: Callable[[dict[str, Any]], bool] = lambda state: True
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest readable checkpoint made under ``key`` that ``accept`` takes: ``(step, state)``, or None.

        An unreadable file is passed over for the one before it.

        Raises:
            UserError: every checkpoint of the key is unreadable.
        """
        files, unreadable = self._files(key), 0
        for file in reversed(files):
            try:
                data = torch.load(file, map_location=map_location, weights_only=True)
            except Exception as error:
                log.warning("%s: unreadable checkpoint passed over (%s)", file, type(error).__name__)
                unreadable += 1
                continue
            if accept(data["state"]):
                return data["step"], data["state"]
        if files and unreadable == len(files):
            raise UserError(
                f"{self.path / key}: none of its {len(files)} checkpoints can be read; delete the folder to start the stage anew."
            )
        return None
