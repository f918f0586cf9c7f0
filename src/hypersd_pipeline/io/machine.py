"""Use of processor, memory, disk, network and GPUs while a run goes on, as MLflow's own monitors measure it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping

from hypersd_pipeline.errors import UserError

log = logging.getLogger(__name__)

SECONDS = 10.0


class MachineMonitor:
    """Measures in a thread, and hands each point to `record`. MLflow shows what begins with ``system/`` on a page of its own.

    Args:
        record: takes metrics by name, and the number of the point.
        seconds: between two points.
    """

    def __init__(self, record: Callable[[Mapping[str, float], int], None], seconds: float) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # no GPU, or nvidia-ml-py is not installed
            self._monitors.append(GPUMonitor())
        self._record, self._seconds, self._points = record, seconds, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="machine", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Measure once more, and end."""
        self._stop.set()
        self._thread.join(5)

    def _work(self) -> None:
        while True:
            stopped = self._stop.wait(self._seconds)
            try:
                self._point()
            except Exception as error:  # whatever it is, training goes on
                log.debug("the use of this machine is not recorded: %r", error)
            if stopped:
                return

    def _point(self) -> None:
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
            monitor.clear_metrics()
        self._record(values, self._points)
        self._points += 1


def seconds_between(environment: Mapping[str, str] = os.environ) -> float | None:
    """What MLflow's own variables ask for. None where they switch it off.

    Raises:
        UserError: MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL is no positive number.
    """
    if environment.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("false", "0"):
        return None
    given = environment.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or str(SECONDS)
    with contextlib.suppress(ValueError):
        if 0 < float(given) < float("inf"):
            return float(given)
    raise UserError(f"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL: '{given}' is no positive number of seconds, so correct it or unset it.")
