"""Datasets of numbers: final metrics as JSON, and live curves."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import replacing_file, write_text
from hypersd_pipeline.io import tracking

logger = logging.getLogger(__name__)


def jsonable(value: Any) -> Any:
    """`value` with numpy and torch scalars as Python numbers and non-finite numbers as None (JSON has neither)."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    number = float(value)
    return number if math.isfinite(number) else None


class MetricsDataset(AbstractDataset[dict[str, Any], dict[str, Any]]):
    """A (nested) dictionary of numbers as a JSON file, the form that DVC reads. Non-finite numbers are stored as null."""

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self.metadata = Path(filepath), metadata

    def load(self) -> dict[str, Any]:
        try:
            return json.loads(self._filepath.read_text())
        except json.JSONDecodeError as error:
            raise UserError(f"{self._filepath} is not valid JSON ({error}); delete it and run its stage again.") from error

    def save(self, data: dict[str, Any]) -> None:
        write_text(self._filepath, json.dumps(jsonable(data), indent=2) + "\n")

    def _exists(self) -> bool:
        return self._filepath.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


class CurveFile:
    """A CSV file of metrics by step. A run that resumes at step s drops the rows from s on and goes on after them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] | None = None  # None until the first write: what the file holds is not known yet

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Append `rows` (each with a ``step``); a column seen for the first time rewrites the file."""
        new = dict.fromkeys(key for row in rows for key in row)
        if self._columns is not None and set(new) <= set(self._columns):
            self._write(rows, self._path, header=False)
            return
        kept = [row for row in self._read() if self._columns is not None or int(row["step"]) < rows[0]["step"]]
        self._columns = list(dict.fromkeys(["step", *(key for row in kept for key in row), *new]))
        with replacing_file(self._path) as temporary:
            self._write([*kept, *rows], temporary, header=True)

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]

    def _write(self, rows: list[dict[str, Any]], path: Path, header: bool) -> None:
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns or [], extrasaction="ignore")
            if header:
                writer.writeheader()
            writer.writerows(rows)


class MetricStream:
    """``stream({"train/loss": 0.1}, step)``: live curves in a CSV file and in the run's tracking journal.

    Both are on disk when the call returns, so that a kill loses no point before the checkpoint from which the next run goes on. A value
    that is not finite is kept in the file and left out of MLflow.
    """

    def __init__(self, path: Path) -> None:
        self._file = CurveFile(path)

    def __call__(self, metrics: Mapping[str, Any], step: int) -> None:
        values = {key: float(value) for key, value in metrics.items()}
        self._file.append([{"step": int(step), **values}])
        tracking.log_point(values, int(step))


class MetricStreamDataset(AbstractDataset[None, MetricStream]):
    """Loads as a `MetricStream`: a node takes it as an input, so that node code neither imports MLflow nor opens files.

    The file is there from then on. DVC wants it as an output also of a stage that was finished before, and so writes nothing.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath, self.metadata = Path(filepath), metadata

    def load(self) -> MetricStream:
        self._filepath.parent.mkdir(parents=True, exist_ok=True)
        self._filepath.touch()
        return MetricStream(self._filepath)

    def save(self, data: None) -> None:
        raise UserError("A metric stream is an input of a node and never its output: correct the wiring in pipeline.py.")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": os.fspath(self._filepath)}
