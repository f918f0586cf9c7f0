"""Checkpoints from which a run continues bit for bit. Tensors and plain containers only, loaded with ``weights_only=True``."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

from hypersd_pipeline.errors import UserError

log = logging.getLogger(__name__)


def fingerprint(*parts: Any) -> str:
    """A short hash of anything JSON can write: what a checkpoint must agree with to be continued."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class CheckpointStore:
    """A folder with the newest checkpoints of one training stage.

    Args:
        path: the folder; created on the first save.
        keep: how many checkpoints stay.
    """

    def __init__(self, path: Path | str, keep: int = 2) -> None:
        self.path = Path(path)
        self.keep = keep

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("step-*.pt"))

    def save(self, step: int, key: str, state: dict[str, Any]) -> None:
        """Write atomically: a kill in the middle leaves the previous checkpoint."""
        self.path.mkdir(parents=True, exist_ok=True)
        target = self.path / f"step-{step:08d}.pt"
        temporary = target.with_suffix(".tmp")
        torch.save({"step": step, "key": key, "state": state}, temporary)
        os.replace(temporary, target)
        for old in self._files()[: -self.keep]:
            old.unlink()

    def load(self, key: str, map_location: str | torch.device = "cpu") -> tuple[int, dict[str, Any]] | None:
        """The newest readable checkpoint made under ``key``: ``(step, state)``, or None.

        Checkpoints of another configuration are set aside with a log line: a changed configuration starts anew. An unreadable file is
        passed over for the one before it.

        Raises:
            UserError: every checkpoint of the folder is unreadable.
        """
        files = self._files()
        unreadable = []
        for file in reversed(files):
            try:
                data = torch.load(file, map_location=map_location, weights_only=True)
                step, state, made_with = data["step"], data["state"], data["key"]
            except Exception as error:
                log.warning("%s: unreadable checkpoint passed over (%s)", file, type(error).__name__)
                unreadable.append(file)
                continue
            if made_with == key:
                return step, state
            log.info("%s: made with another configuration, data or teacher; this stage starts anew", file)
            self.clear()
            return None
        if unreadable:
            raise UserError(
                f"{self.path}: none of its {len(unreadable)} checkpoints can be read; delete the folder to start the stage anew."
            )
        return None

    def clear(self) -> None:
        """Delete every checkpoint of the folder."""
        for file in self._files():
            file.unlink()
