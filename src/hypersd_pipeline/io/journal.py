"""Tracking that never stops training: a run writes to a journal, and a thread sends what the journal holds to MLflow.

A journal is a file of JSON lines. Each names a run (``0`` is the pipeline's, others are stages and parts of them) and does one thing:
``open`` it, set its ``params`` or ``tags``, add ``metrics``, send an ``artifact`` (a file or folder, by its path) or set its ``status``.
Beside ``<run>.jsonl`` lie ``<run>.sent`` (how far MLflow has it, and the ids there), ``<run>.lock`` (held by who writes or sends it) and,
should MLflow refuse entries, ``<run>.refused``. A journal that is sent whole is removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import lock
from hypersd_pipeline.masking import masked

if TYPE_CHECKING:
    from hypersd_pipeline.io.mlflow_store import Store

log = logging.getLogger(__name__)

PIPELINE = "0"
_LONGEST = {"params": 6000, "tags": 5000}  # characters of a value that MLflow takes
_BATCH = {"metrics": 1000, "params": 100}  # entries that MLflow takes in one request
_RENEW_SECONDS, _LONGEST_PAUSE = 30.0, 20.0


# --- writing -----------------------------------------------------------------------------------------------------------------------------


def milliseconds() -> int:
    """Now, as MLflow counts."""
    return int(time.time() * 1000)


def folder_id(folder: Path) -> str:
    """A name for the content of a data folder, wherever it is mounted. Made at the first call."""
    path = folder / "id"
    with lock(folder / "id.lock", f"Naming {folder}", seconds=10):
        if not path.exists():
            path.write_text(uuid.uuid4().hex)
        return path.read_text()


def shared_run(folder: Path, environment: Mapping[str, str]) -> str | None:
    """The id of the MLflow run that several commands record into, one for each stage. None for a command with a run of its own.

    ``HYPERSD_PIPELINE_ID`` gives it. The stages of one DVC experiment have its name, and those of ``dvc repro`` share a file in the data
    folder, on whichever machine they run, until `end_shared_run` removes it.
    """
    if given := environment.get("HYPERSD_PIPELINE_ID"):
        return given
    if "DVC_STAGE" not in environment:
        return None
    if name := environment.get("DVC_EXP_NAME"):
        return f"dvc-exp-{name}"
    path = folder / "pipeline"
    with lock(folder / "id.lock", f"Naming the runs of {folder}", seconds=10):
        if not path.exists():
            path.write_text(f"dvc-{uuid.uuid4().hex[:12]}")
        return path.read_text()


def end_shared_run(folder: Path) -> None:
    """The last stage is done: the next ``dvc repro`` begins another run."""
    (folder / "pipeline").unlink(missing_ok=True)


class Journal:
    """The journal of this process's run. Nothing it does raises, and each entry is in the file when `write` returns.

    Args:
        folder: where journals lie.
        begun: the first entry: opens the pipeline's run.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, begun: Mapping[str, Any]) -> None:
        slug = re.sub(r"[^\w.-]+", "-", begun["open"])[:80].strip("-")
        self.path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{slug}-{os.getpid()}.jsonl"
        self._held, self._guard, self._failed = contextlib.ExitStack(), threading.Lock(), False
        try:
            self._held.enter_context(lock(self.path.with_suffix(".lock"), f"Recording in {self.path}"))
            self._file = self._held.enter_context(self.path.open("w", encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}), so make room there or correct its permissions.") from error
        self.write({"run": PIPELINE, **begun})

    def write(self, entry: Mapping[str, Any]) -> None:
        """Add an entry. Secrets in it are masked, and a full disk is one warning."""
        line = json.dumps({name: value if name in ("metrics", "artifact") else _masked(value, name) for name, value in entry.items()})
        try:
            with self._guard:
                self._file.write(line + "\n")
                self._file.flush()
        except (OSError, ValueError) as error:  # ValueError: closed
            if not self._failed:
                self._failed = True
                log.warning("%s cannot be written (%s), so MLflow will lack metrics of this run.", self.path, error)

    def close(self) -> None:
        """Let others send what is left."""
        with contextlib.suppress(OSError):
            self._held.close()


def _masked(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping):
        return {str(key): _masked(item, name) for key, item in value.items()}
    return masked(value)[: _LONGEST.get(name)] if isinstance(value, str) else value


# --- sending -----------------------------------------------------------------------------------------------------------------------------


class Delivery:
    """The way of one journal into MLflow: what comes next, and what is there already.

    Entries that were sent just before a kill may be sent again. MLflow keeps one of two equal points.
    """

    def __init__(self, path: Path, store: Store) -> None:
        self.path, self.refused = path, 0
        self._store, self._sent = store, path.with_suffix(".sent")
        self._process, self._failures, self._parameters = "", 0, dict[str, dict[str, str]]()
        try:
            state = json.loads(self._sent.read_text())
        except (OSError, ValueError):
            state = {}
        if state.get("target") != store.target:
            state = {}  # another server has not seen anything yet
        self._offset, self.runs = int(state.get("offset", 0)), dict(state.get("runs", {}))

    def all(self, patient: bool = False) -> None:
        """Send what the journal holds. Raises what MLflow raises when it is away."""
        while self._step(patient):
            pass

    @property
    def left(self) -> int:
        """How many entries are not in MLflow yet."""
        return len(self._lines(None))

    def finish(self) -> None:
        """Close the run of a process that is gone, and remove what is sent."""
        if PIPELINE in self.runs:
            with self.path.open(encoding="utf-8") as file:
                begun = json.loads(file.readline())
            self._store.close_of(self.runs[PIPELINE], begun["process"])
        self.remove()

    def remove(self) -> None:
        """Remove the journal, which MLflow has."""
        for suffix in (".jsonl", ".sent", ".lock"):
            self.path.with_suffix(suffix).unlink(missing_ok=True)

    def _lines(self, size: int | None) -> list[bytes]:
        with self.path.open("rb") as file:
            file.seek(self._offset)
            lines = file.readlines() if size is None else file.readlines(size)
        return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]  # the last one is being written

    def _step(self, patient: bool) -> bool:
        """Send the next entry, or all metrics up to the next entry of another kind. False where there is none."""
        lines = self._lines(1 << 18)
        if not lines:
            return False
        entries: list[dict[str, Any]] = []
        for line in lines:
            entry = _parsed(line)
            if entries and not ("metrics" in entry and "metrics" in entries[0]):
                break
            entries.append(entry)
            if len(entries) == _BATCH["metrics"]:
                break
        taken = lines[: len(entries)]
        try:
            self._send(entries, patient)
        except Exception as error:
            if not self._is_refusal(error, entries[0]):
                raise
            log.debug("MLflow refuses %s: %s", entries[0], error)
            self.refused += len(taken)
            with self.path.with_suffix(".refused").open("ab") as file:
                file.writelines(taken)
        self._offset += sum(map(len, taken))
        self._failures = 0
        self._remember()
        return True

    def _remember(self) -> None:
        temporary = self._sent.with_suffix(".sending")
        with temporary.open("w") as file:
            json.dump({"target": self._store.target, "offset": self._offset, "runs": self.runs}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._sent)

    def _is_refusal(self, error: Exception, entry: Mapping[str, Any]) -> bool:
        """Whether trying again is of no use. Artifacts may have a store of their own that fails while MLflow answers."""
        if isinstance(error, KeyError):  # of a run that could not be opened
            return True
        if getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"):
            return True
        if not {"artifact", "image"} & entry.keys():
            return False
        if isinstance(error, FileNotFoundError | PermissionError | ImportError):
            return True
        self._failures += 1
        self._store.client.get_run(self.runs[entry["run"]])
        return self._failures > 2

    def _send(self, entries: list[dict[str, Any]], patient: bool) -> None:
        entry = entries[0]
        if "metrics" in entry:
            self._send_metrics(entries)
        elif "open" in entry:
            run = entry["run"]
            self.runs[run] = self._store.child(self.runs[entry["under"]], entry) if run != PIPELINE else self._store.parent(entry, patient)
        elif "params" in entry:
            self._send_parameters(self.runs[entry["run"]], entry["params"])
        elif "tags" in entry:
            self._store.tag(self.runs[entry["run"]], entry["tags"])
        elif "dataset" in entry:
            self._send_dataset(self.runs[entry["run"]], entry["dataset"])
        elif "image" in entry:
            self._send_image(self.runs[entry["run"]], entry["image"], entry["name"])
        elif "artifact" in entry:
            path, run_id = Path(entry["artifact"]), self.runs[entry["run"]]
            if path.is_dir():
                self._store.client.log_artifacts(run_id, str(path), entry["to"])
            else:
                self._store.client.log_artifact(run_id, str(path))
        elif "status" in entry:
            self._store.close(self.runs[entry["run"]], entry["status"], entry["time"])

    def _send_metrics(self, entries: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics: dict[str, list[Metric]] = {}
        for entry in entries:
            points = [Metric(name, value, entry["time"], entry["step"]) for name, value in entry["metrics"].items()]
            metrics.setdefault(self.runs[entry["run"]], []).extend(points)
        for run_id, points in metrics.items():
            for start in range(0, len(points), _BATCH["metrics"]):
                self._store.client.log_batch(run_id, points[start : start + _BATCH["metrics"]])

    def _send_dataset(self, run_id: str, given: Mapping[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", "training")]
        self._store.client.log_inputs(run_id, [DatasetInput(Dataset(**given), tags)])

    def _send_image(self, run_id: str, path: str, name: str) -> None:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path, formats=["PNG"]) as opened:
                image = opened.convert("RGB")
        except UnidentifiedImageError as error:
            raise FileNotFoundError(f"{path} is no PNG file") from error  # it never will be
        self._store.client.log_image(run_id, image, key=name, step=0)

    def _send_parameters(self, run_id: str, parameters: Mapping[str, str]) -> None:
        """MLflow keeps the first value of a parameter for good: another one is recorded as ``name.2`` and so on."""
        from mlflow.entities import Param

        if run_id not in self._parameters:
            self._parameters[run_id] = self._store.parameters(run_id)
        known, new = self._parameters[run_id], dict[str, str]()
        for name, value in parameters.items():
            number, free = 1, name
            while known.get(free, value) != value:
                number += 1
                free = f"{name}.{number}"
            if free != name and free not in known:
                log.info("The MLflow run has another value of %s from an earlier call, so this one is recorded as %s.", name, free)
            if free not in known:
                new[free] = value
        items = [Param(name, value) for name, value in new.items()]
        for start in range(0, len(items), _BATCH["params"]):
            self._store.client.log_batch(run_id, params=items[start : start + _BATCH["params"]])
        known |= new


def _parsed(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict) and "run" in entry:
            return entry
    return {"run": ""}  # damaged by a power failure


def send_left(folder: Path, store: Store, own: Path | None = None) -> tuple[int, int]:
    """Send the journals of `folder` that no living process writes, oldest first, and close their runs.

    Returns:
        How many were sent, and how many entries of them MLflow refused.
    """
    sent = refused = 0
    for path in sorted(folder.glob("*.jsonl")):
        if path == own:
            continue
        with contextlib.suppress(UserError), lock(path.with_suffix(".lock"), f"Sending {path}"):
            if not path.exists():  # somebody else sent it meanwhile
                continue
            delivery = Delivery(path, store)
            try:
                delivery.all()
                delivery.finish()
            except Exception as error:
                store.client.get_experiment(store.experiment)  # raises where the store is away
                log.debug("%s is left for later: %r", path, error)
                continue
            sent, refused = sent + 1, refused + delivery.refused
    return sent, refused


class Sender:
    """Sends journals in the background: first those that earlier runs left, then this run's while it grows.

    Args:
        journal: of this run.
        store: where to.
        pause: seconds between two looks at the journal.
    """

    def __init__(self, journal: Journal, store: Store, pause: float = 1.0) -> None:
        self.delivery = Delivery(journal.path, store)
        self.failure: Exception | None = None
        self._journal, self._store, self._pause = journal, store, pause
        self._finishing, self._wake = threading.Event(), threading.Event()
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def finish(self, seconds: float) -> bool:
        """Send the rest, for `seconds` at most. Whether everything is sent. The journal is removed then, and kept otherwise."""
        self._finishing.set()
        self._wake.set()
        self._thread.join(seconds)
        done = not self._thread.is_alive() and self.failure is None
        if done:
            self.delivery.remove()
        self._journal.close()
        return done

    def _work(self) -> None:
        todo: list[Callable[[], Any]] = [
            lambda: send_left(self._journal.path.parent, self._store, own=self._journal.path),
            self._store.close_dead,
        ]
        pause, last_tries = 0.0, 3
        while last_tries:
            finishing = self._finishing.is_set()
            try:
                while todo:
                    todo[0]()
                    todo.pop(0)
                self._send(patient=not finishing)
                self.failure, pause = None, 0.0
                if finishing:
                    return
            except Exception as error:  # whatever it is, training goes on
                log.debug("not sent to MLflow: %r", error)
                self.failure, pause = error, min(max(1.0, 2 * pause), 2.0 if finishing else _LONGEST_PAUSE)
                last_tries -= finishing
            self._wake.wait(pause or self._pause)
            self._wake.clear()

    def _send(self, patient: bool) -> None:
        from hypersd_pipeline.io.mlflow_store import NotYetKnown

        if PIPELINE in self.delivery.runs and time.monotonic() - self._renewed > _RENEW_SECONDS:
            self._store.renew(self.delivery.runs[PIPELINE])
            self._renewed = time.monotonic()
        with contextlib.suppress(NotYetKnown):
            self.delivery.all(patient)
