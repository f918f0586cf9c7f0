"""The database of an arena's votes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.masking import masked

if TYPE_CHECKING:
    from hypersd_pipeline.arena.votes import VoteStore


class VotesDataset(AbstractDataset[None, "VoteStore"]):
    """Loads as a `VoteStore`: on a SQLite file, or on the database of ``uri`` where that is not empty."""

    def __init__(self, *, filepath: str, uri: str = "", metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self._uri, self.metadata = Path(filepath), uri, metadata

    def load(self) -> VoteStore:
        """Open it, and make its table where there is none. Raises UserError."""
        from hypersd_pipeline.arena.votes import VoteStore

        if not self._uri:
            self._filepath.parent.mkdir(parents=True, exist_ok=True)
        return VoteStore(self._uri or f"sqlite:///{self._filepath.absolute()}")

    def save(self, data: None) -> None:
        raise UserError("Votes are an input of a node and never its output: correct the wiring in pipeline.py.")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath), "uri": masked(self._uri)}
