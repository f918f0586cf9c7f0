"""A folder that a node writes itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset

from hypersd_pipeline.errors import UserError


class FolderDataset(AbstractDataset[Callable[[Path], None], Path]):
    """Saves a function ``writer(path)`` by calling it, loads the path: nodes stay pure, and writing can be incremental and resumable."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self.metadata = Path(filepath), metadata

    def save(self, data: Callable[[Path], None]) -> None:
        """Call ``data(path)``. The folder exists."""
        self._filepath.mkdir(parents=True, exist_ok=True)
        data(self._filepath)

    def load(self) -> Path:
        """The folder's path.

        Raises:
            UserError: it is not there.
        """
        if not self._filepath.is_dir():
            raise UserError(f"{self._filepath} is missing; run the pipeline that writes it first (data_prep writes the data set).")
        return self._filepath

    def _exists(self) -> bool:
        return self._filepath.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}
