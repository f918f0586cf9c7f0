"""What is sent to MLflow, and in which form. Nothing here needs a run: without one, calls do nothing."""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
STAGE_TAG = "stage"
_warned: set[str] = set()
_BATCH = 1000  # metrics that MLflow takes in one request


def metric_name(name: str) -> str:
    """`name` with characters that MLflow refuses replaced by an underscore."""
    return re.sub(r"[^\w.\- /]", "_", name)


def flatten(values: Mapping[str, Any], prefix: str = "", sep: str = "/") -> dict[str, Any]:
    """Nested dictionaries and lists as one level: ``{"fid": {"4": 31.2}}`` becomes ``{"fid/4": 31.2}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{sep}{key}" if prefix else str(key)
        if isinstance(value, list | tuple):
            value = {str(index): item for index, item in enumerate(value)}
        flat |= flatten(value, name, sep) if isinstance(value, Mapping) else {name: value}
    return flat


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of `values`; the others (text, None, NaN, infinity) are left out, a NaN or infinity with one warning per name."""
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


def _targets() -> Iterable[tuple[str, str, bool]]:
    """(run id, prefix, whether it is a stage's run): the active run with plain names, and its parent with the stage's name in front."""
    import mlflow

    run = mlflow.active_run()
    if run is None:
        return
    is_stage = PARENT_TAG in run.data.tags and STAGE_TAG in run.data.tags
    yield run.info.run_id, "", is_stage
    if is_stage:
        yield run.data.tags[PARENT_TAG], f"{run.data.tags[STAGE_TAG]}/", False


@contextmanager
def child_run(name: str, parameters: Mapping[str, Any]) -> Iterator[None]:
    """A nested run for a part of a node's work, with its parameters flattened; nothing where no run is active."""
    import mlflow

    if mlflow.active_run() is None:
        yield
        return
    with mlflow.start_run(run_name=name, nested=True):
        mlflow.log_params(flatten(parameters, sep="."))
        yield


def log_rows(rows: list[dict[str, Any]], stamps: list[float]) -> None:
    """Send curve rows (each with a ``step``) and their times (seconds) to the active run and its parent."""
    for run_id, prefix, _ in _targets():
        _send(run_id, prefix, rows, stamps)


def _send(run_id: str, prefix: str, rows: list[dict[str, Any]], stamps: list[float]) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    metrics = [
        Metric(prefix + name, value, int(stamp * 1000), row["step"])
        for row, stamp in zip(rows, stamps, strict=True)
        for name, value in finite(row).items()
        if name != "step"
    ]
    for start in range(0, len(metrics), _BATCH):
        MlflowClient().log_batch(run_id, metrics[start : start + _BATCH])


def log_final(metrics: Mapping[str, Any]) -> None:
    """Send final metrics, flattened, to the active run and, with the stage's name in front, to its parent.

    The parent gets no interval ends (``..._low``, ``..._high``): there runs are compared at a glance. They are in the stage's own run and
    in the results table.
    """
    import time

    values = finite(flatten(metrics))
    brief = {name: value for name, value in values.items() if not name.endswith(("_low", "_high"))}
    for run_id, prefix, is_stage in _targets():
        _send(run_id, prefix, [{"step": 0, **(values if is_stage else brief)}], [time.time()])
