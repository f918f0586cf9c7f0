"""What nodes and hooks record, and in which form. Nothing here needs MLflow or a run: without one, calls do nothing."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hypersd_pipeline.io.journal import PIPELINE, Journal, milliseconds

logger = logging.getLogger(__name__)

STAGE_TAG = "stage"
_warned: set[str] = set()


def metric_name(name: str) -> str:
    """`name` with characters that MLflow refuses replaced by an underscore."""
    return re.sub(r"[^\w.\- /]", "_", name)


def flatten(values: Mapping[str, Any], prefix: str = "", sep: str = "/", lists: bool = True) -> dict[str, Any]:
    """Nested dictionaries, and lists if `lists`, as one level: ``{"fid": {"4": 31.2}}`` becomes ``{"fid/4": 31.2}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{sep}{key}" if prefix else str(key)
        if lists and isinstance(value, list | tuple):
            value = {str(index): item for index, item in enumerate(value)}
        flat |= flatten(value, name, sep, lists) if isinstance(value, Mapping) else {name: value}
    return flat


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of `values`. The others (text, None, NaN, infinity) are left out, a NaN or infinity with one warning per name."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if value is None or isinstance(value, str):
            continue
        if math.isfinite(value):
            numbers[metric_name(name)] = float(value)
        elif name not in _warned:
            _warned.add(name)
            logger.warning("%s is %s: such values are not recorded in MLflow.", name, value)
    return numbers


def without_intervals(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Final metrics, flattened, without the ends of their intervals (``..._low``, ``..._high``)."""
    return {name: value for name, value in finite(flatten(metrics)).items() if not name.endswith(("_low", "_high"))}


class Recorder:
    """Writes to a journal on behalf of the innermost open run. Runs are opened inside each other.

    A stage's metrics are in its own run. The pipeline's run has the few by which runs compare at a glance, see `headline`.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._names: list[str] = []  # of the open runs inside the pipeline's, outermost first
        self._ids: dict[tuple[str, ...], str] = {}

    @property
    def stage(self) -> str | None:
        """The open stage."""
        return self._names[0] if self._names else None

    @property
    def _run(self) -> str:
        return self._ids[tuple(self._names)] if self._names else PIPELINE

    def open(self, name: str, tags: Mapping[str, str]) -> None:
        """Open, or open again, a run inside the innermost one."""
        under = self._run
        self._names.append(name)
        run = self._ids.setdefault(tuple(self._names), str(len(self._ids) + 1))
        self.journal.write({"run": run, "open": name, "under": under, "time": milliseconds(), "tags": tags})

    def close(self, status: str) -> None:
        """Close the innermost run inside the pipeline's."""
        self.journal.write({"run": self._run, "status": status, "time": milliseconds()})
        self._names.pop()

    def close_all(self, status: str, parent: bool = True) -> None:
        """Close all that is open, and the pipeline's run if `parent`."""
        while self._names:
            self.close(status)
        if parent:
            self.journal.write({"run": PIPELINE, "status": status, "time": milliseconds()})

    def parameters(self, parameters: Mapping[str, Any], in_pipeline: bool = False) -> None:
        """Record parameters, flattened: in the innermost run or the pipeline's."""
        named = {re.sub(r"[^\w.\- /:]", "_", name): str(value) for name, value in flatten(parameters, sep=".", lists=False).items()}
        if named:
            self.journal.write({"run": PIPELINE if in_pipeline else self._run, "params": named})

    def tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the pipeline's run."""
        self.journal.write({"run": PIPELINE, "tags": tags})

    def artifact(self, path: str, folder: str) -> None:
        """Keep a file, or a folder under the name `folder`, in the innermost run."""
        self.journal.write({"run": self._run, "artifact": path, "to": folder})

    def image(self, path: str, name: str) -> None:
        """Show a PNG file under `name` among the innermost run's images."""
        self.journal.write({"run": self._run, "image": path, "name": name})

    def dataset(self, name: str, digest: str, source: str) -> None:
        """Say which data the pipeline's run was trained on."""
        self.journal.write({"run": PIPELINE, "dataset": {"name": name, "digest": digest[:36], "source_type": "local", "source": source}})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Add `values` to the innermost run."""
        self._point(self._run, values, step)

    def headline(self, values: Mapping[str, float], step: int = 0) -> None:
        """Add `values` to the pipeline's run."""
        self._point(PIPELINE, values, step)

    def _point(self, run: str, values: Mapping[str, float], step: int) -> None:
        if values:
            self.journal.write({"run": run, "metrics": dict(values), "step": step, "time": milliseconds()})


recorder: Recorder | None = None  # of the running pipeline. Set by the hook


@contextmanager
def child_run(name: str, parameters: Mapping[str, Any]) -> Iterator[None]:
    """A nested run for a part of a node's work, with its parameters flattened. Nothing where no run is active."""
    inside = recorder
    if inside is None:
        yield
        return
    inside.open(name, {})
    inside.parameters(parameters)
    try:
        yield
    except BaseException:
        inside.close("FAILED")
        raise
    inside.close("FINISHED")


def log_point(values: Mapping[str, Any], step: int) -> None:
    """Record a point of live curves."""
    if recorder is not None:
        recorder.metrics(finite(values), step)


def log_final(metrics: Mapping[str, Any]) -> None:
    """Record final metrics, flattened, in the active run."""
    if recorder is not None:
        recorder.metrics(finite(flatten(metrics)), 0)
