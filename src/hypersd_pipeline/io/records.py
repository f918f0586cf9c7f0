"""Results of many small jobs, kept one by one, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import write_text
from hypersd_pipeline.io import tracking

if TYPE_CHECKING:
    from hypersd_pipeline.io.metrics import MetricStream

log = logging.getLogger(__name__)


class RecordStore:
    """A folder with a JSON file and a curve per job; a record counts only under the key it was made with."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _file(self, name: str, suffix: str) -> Path:
        return self.path / f"{re.sub('[^A-Za-z0-9=.-]+', '_', name)}{suffix}"

    def get(self, name: str, key: str) -> dict[str, Any] | None:
        """The record of a job, or None where there is none under this key (or only half of one)."""
        try:
            content = json.loads(self._file(name, ".json").read_text())
        except (OSError, ValueError):
            return None
        return content["record"] if content.get("key") == key else None

    def put(self, name: str, key: str, record: dict[str, Any]) -> None:
        """Write a record, whole or not at all."""
        write_text(self._file(name, ".json"), json.dumps({"name": name, "key": key, "record": record}, indent=1) + "\n")

    def once(self, name: str, key: str, parameters: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a job, made now unless it was made before. Then in a nested MLflow run with the parameters and the metrics."""
        found = self.get(name, key)
        if found is not None:
            log.info("%s, %s: done before", self.path.name, name)
            return found
        with tracking.child_run(name, parameters):
            record = make()
            tracking.log_final(record)
        self.put(name, key, record)
        return record

    @contextmanager
    def stream(self, name: str) -> Iterator[MetricStream]:
        """Where the live metrics of a job go: a curve, and the nested MLflow run that gets its record too."""
        from hypersd_pipeline.io.metrics import MetricStream

        with tracking.child_run(name, {}):
            yield MetricStream(self._file(name, ".csv"))


class RecordsDataset(AbstractDataset[None, RecordStore]):
    """Loads as a `RecordStore` on ``filepath``."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self.metadata = Path(filepath), metadata

    def load(self) -> RecordStore:
        return RecordStore(self._filepath)

    def save(self, data: None) -> None:
        raise UserError("Records are an input of a node and never its output: correct the wiring in pipeline.py.")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}
