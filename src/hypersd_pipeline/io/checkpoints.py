"""The handle through which a training node reaches its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset

from hypersd_pipeline.errors import UserError

if TYPE_CHECKING:
    from hypersd_pipeline.training.checkpoints import CheckpointStore


class CheckpointsDataset(AbstractDataset[None, "CheckpointStore"]):
    """Loads as a `CheckpointStore` on `filepath`, a folder outside DVC's outs: DVC deletes outs before it runs a stage.

    Args:
        restart: see `CheckpointStore`. The catalog takes it from ``--params restart=true``.
    """

    def __init__(self, *, filepath: str, keep: int = 2, restart: bool = False, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self._keep, self._restart, self.metadata = Path(filepath), keep, restart, metadata

    def load(self) -> CheckpointStore:
        from hypersd_pipeline.training.checkpoints import CheckpointStore

        return CheckpointStore(self._filepath, keep=self._keep, restart=self._restart)

    def save(self, data: None) -> None:
        raise UserError("Checkpoints are an input of a node and never its output: correct the wiring in pipeline.py.")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath), "keep": self._keep}
