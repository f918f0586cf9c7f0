"""The cache of latents and text embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset

if TYPE_CHECKING:
    from hypersd_pipeline.data.cache import LatentCache


class LatentCacheDataset(AbstractDataset[Callable[[Path], None], "LatentCache"]):
    """Saves a function ``writer(path)`` by calling it, loads a :class:`hypersd_pipeline.data.cache.LatentCache`.

    Args:
        filepath: the cache's folder.
        manifest: ``{filepath: <the manifest's folder>}``; a cache made from other rows is refused on loading.
    """

    def __init__(self, *, filepath: str, manifest: dict[str, str] | None = None, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self.metadata = Path(filepath), metadata
        self._manifest = Path(manifest["filepath"]) if manifest else None

    def save(self, data: Callable[[Path], None]) -> None:
        """Call ``data(path)``, which builds the cache or what is missing of it."""
        data(self._filepath)

    def load(self) -> LatentCache:
        """Open the cache.

        Raises:
            UserError: it is missing, unfinished or damaged, or stale against the manifest.
        """
        from hypersd_pipeline.data.cache import LatentCache
        from hypersd_pipeline.data.rows import read_manifest

        return LatentCache(self._filepath, {"rows": read_manifest(self._manifest).key} if self._manifest else None)

    def _exists(self) -> bool:
        return (self._filepath / "index.json").exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath), "manifest": str(self._manifest)}
