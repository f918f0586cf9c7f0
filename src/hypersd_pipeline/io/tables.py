"""Tables of the data set: the manifest of good rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset

if TYPE_CHECKING:
    from hypersd_pipeline.data.rows import Manifest


class ManifestDataset(AbstractDataset["Manifest", "Manifest"]):
    """A :class:`hypersd_pipeline.data.rows.Manifest` as one JSONL file per split."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self.metadata = Path(filepath), metadata

    def save(self, data: Manifest) -> None:
        """Replace the folder."""
        from hypersd_pipeline.data.rows import write_manifest

        write_manifest(self._filepath, data)

    def load(self) -> Manifest:
        """Read all splits.

        Raises:
            UserError: the manifest is missing or damaged.
        """
        from hypersd_pipeline.data.rows import read_manifest

        return read_manifest(self._filepath)

    def _exists(self) -> bool:
        return (self._filepath / "root.json").exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}
