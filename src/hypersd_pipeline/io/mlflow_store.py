"""Where runs are recorded: making MLflow's sqlite file, reaching a server, and finding the run that a new process continues."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import lock
from hypersd_pipeline.masking import masked

log = logging.getLogger(__name__)

_RUNS_FIRST = "workflowType=machine_learning"
"""Ends an address of MLflow's pages so that they show runs. Without it MLflow 3 shows its pages for language models, which have none."""
KEY_TAG, PROCESS_TAG, LEASE_TAG, PARENT_TAG = "run_key", "process", "lease", "mlflow.parentRunId"
LEASE_SECONDS = 120.0  # a process that renewed its lease longer ago is taken for dead by other hosts
_LOCKED_SECONDS = 20.0
_QUIET_SECONDS = 10.0  # a half-made database that nobody wrote to for so long was left by a killed process


class NotYetKnown(Exception):
    """Another host's process holds the run, and whether that one is alive shows once its lease is renewed or has run out."""


# --- the sqlite file ---------------------------------------------------------------------------------------------------------------------


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite address. None for a server."""
    name = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(name) if uri.startswith("sqlite:///") and name not in ("", ":memory:") else None


def make_database(uri: str) -> None:
    """Make MLflow's sqlite file, whole or not at all. Any number of processes may do so at once, and servers are left alone.

    A half-made file without runs, as kills in the first seconds of a first run used to leave, is moved aside with a warning.

    Raises:
        UserError: the file is no sqlite database, or another process makes it for minutes.
    """
    path = sqlite_file(uri)
    if path is None or _state(path) == "whole":
        return
    with lock(path.with_name(f"{path.name}.lock"), f"Making {path}", seconds=180):
        while (state := _state(path)) == "half":
            if time.time() - path.stat().st_mtime > _QUIET_SECONDS:
                aside = path.with_name(f"{path.name}.damaged-{datetime.now():%Y%m%d-%H%M%S}")
                path.rename(aside)
                log.warning("%s was only half made and holds no runs, so it was moved to %s.", path, aside)
            else:
                time.sleep(0.5)
        if state == "missing":
            _make(path)


def _make(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    log.info("Making %s: MLflow takes some seconds for it, once.", path)
    folder = path.with_name(f"{path.name}.making")  # sqlite writes a second file beside the first
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made = folder / path.name
    store = SqlAlchemyStore(f"sqlite:///{made}", str(path.absolute().with_name("mlartifacts")))
    store.engine.dispose()
    with open(made, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(made, path)
    shutil.rmtree(folder, ignore_errors=True)


_LOCATIONS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
"""Columns of MLflow's tables that name folders of artifacts, with their full path."""


def follow_moved_project(uri: str) -> None:
    """Let a sqlite file name the artifacts beside it, where it names those of the folder that the project was moved or copied from.

    MLflow stores full paths. Another location than ``mlartifacts`` beside a database was chosen by somebody and is left alone.
    """
    path = sqlite_file(uri)
    here = path.absolute().with_name("mlartifacts") if path else None
    if path is None or here is None or not path.is_file() or not here.is_dir():
        return
    with contextlib.closing(sqlite3.connect(path, timeout=_LOCKED_SECONDS)) as database, database:
        for (location,) in database.execute("select distinct artifact_location from experiments").fetchall():
            before, found, _ = (location or "").partition("/mlartifacts")
            there = Path(unquote(before.removeprefix("file://"))) / "mlartifacts"
            others = not there.exists() or there.with_name(path.name).is_file()
            if not found or "://" in before.removeprefix("file://") or there == here or not others:
                continue
            new = here.as_uri() if before.startswith("file://") else str(here)
            old = before + found
            log.info("%s: artifacts are now those of %s.", path, here)
            for table, columns in _LOCATIONS.items():
                for column in columns:
                    change = f"update {table} set {column} = ? || substr({column}, ?) where {column} = ? or substr({column}, 1, ?) = ?"
                    database.execute(change, (new, len(old) + 1, old, len(old) + 1, f"{old}/"))


def _state(path: Path) -> str:
    """``missing``, ``half`` (a process is making it, or was killed while it did) or ``whole``."""
    if not path.is_file() or not path.stat().st_size:
        return "missing"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", timeout=_LOCKED_SECONDS, uri=True)) as database:
            tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
            kept = ("runs", "_alembic_tmp_runs", "registered_models")
            if any(database.execute(f"select 1 from {name} limit 1").fetchone() for name in kept if name in tables):
                return "whole"  # what holds something is MLflow's to judge
            versions = list(database.execute("select version_num from alembic_version")) if "alembic_version" in tables else []
    except sqlite3.OperationalError as error:  # locked for long, or not ours to read: it may well hold runs
        raise UserError(f"{path} cannot be opened ({error}), so end what uses it or correct its permissions.") from error
    except sqlite3.DatabaseError as error:
        raise UserError(f"{path} is no sqlite database ({error}), so put a copy back, or move it away to begin a new one.") from error
    return "whole" if versions == [(_newest_version(),)] and not any(name.startswith("_alembic_tmp_") for name in tables) else "half"


def _newest_version() -> str | None:
    import mlflow
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(mlflow.__path__[0]) / "store" / "db_migrations")).get_current_head()


# --- processes ---------------------------------------------------------------------------------------------------------------------------


def _machine() -> str:
    """This host. Containers of one host do not see each other's processes."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}:{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def this_process() -> str:
    """Host, number and start of this process: what the tag ``process`` of a run says."""
    return f"{_machine()}/{os.getpid()}/{psutil.Process().create_time():.0f}"


def _is_alive(process: str) -> bool | None:
    """Whether a process of this machine is alive. None for one of another machine."""
    host, _, rest = process.partition("/")
    if host not in (_machine(), socket.gethostname()) or not rest:
        return None
    pid, _, started = rest.partition("/")
    try:
        return f"{psutil.Process(int(pid)).create_time():.0f}" == started
    except psutil.NoSuchProcess:
        return False


def _is_dead(run: Run) -> bool | None:
    """Whether the process that recorded into `run` is gone. None for one of another machine whose lease has not run out."""
    alive = _is_alive(run.data.tags.get(PROCESS_TAG, ""))
    if alive is not None:
        return not alive
    lease = run.data.tags.get(LEASE_TAG)
    return True if lease and float(lease) < time.time() else None


# --- the store ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Store:
    """An MLflow server or database, and the experiment in it."""

    client: MlflowClient
    uri: str
    experiment: str

    def __post_init__(self) -> None:
        self._seen: dict[str, str] = {}  # leases of runs of other hosts

    @property
    def target(self) -> str:
        """What tells it from other stores: run ids of one mean nothing to another."""
        return f"{masked(self.uri)} {self.experiment}"

    def page(self, run_id: str) -> str:
        """Where `run_id` is to be seen: an address, or the command that makes it one."""
        experiment = self.client.get_run(run_id).info.experiment_id
        place = f"/#/experiments/{experiment}/runs/{run_id}?{_RUNS_FIRST}"
        if self.uri.startswith("http"):
            return f"see {masked(self.uri).rstrip('/')}{place}"
        uri = masked(self.uri)
        file = sqlite_file(uri)
        if file and file.is_relative_to(Path.cwd()):
            uri = f"sqlite:///{file.relative_to(Path.cwd())}"
        return f"run `mlflow server --backend-store-uri {uri}` and see http://127.0.0.1:5000{place}"

    def parent(self, begun: Mapping[str, Any], patient: bool) -> str:
        """The run of a pipeline run: the one that was given, the one of the same key, or a new one.

        A key that commands share keeps its run, whatever they did to it. Otherwise a finished run is left alone.

        Args:
            begun: the first entry of a journal.
            patient: whether it may wait until another host's process proves to be alive or dead.

        Raises:
            NotYetKnown: it waits.
        """
        run_id = begun["given"] or self._unfinished(begun, patient)
        now = {PROCESS_TAG: begun["process"], LEASE_TAG: _lease()}
        if run_id:
            self._reopen(run_id, begun["tags"] | now)
            return run_id
        return self._create(self.experiment, begun, begun["tags"] | now | {KEY_TAG: begun["key"]})

    def child(self, parent: str, begun: Mapping[str, Any]) -> str:
        """The run inside `parent` of the same name, or a new one."""
        experiment = self.client.get_run(parent).info.experiment_id
        for run in self.client.search_runs([experiment], f"tags.\"{PARENT_TAG}\" = '{parent}'"):
            if run.info.run_name == begun["open"]:
                self._reopen(run.info.run_id, begun["tags"])
                return run.info.run_id
        return self._create(experiment, begun, begun["tags"] | {PARENT_TAG: parent})

    def _unfinished(self, begun: Mapping[str, Any], patient: bool) -> str | None:
        newest = self.client.search_runs(
            [self.experiment], f"tags.{KEY_TAG} = '{begun['key']}'", order_by=["attributes.start_time DESC"], max_results=1
        )
        if newest and begun.get("shared"):
            return newest[0].info.run_id
        if not newest or newest[0].info.status == "FINISHED":
            return None
        run = newest[0]
        run_id, lease = run.info.run_id, run.data.tags.get(LEASE_TAG, "")
        if run.info.status != "RUNNING" or run.data.tags.get(PROCESS_TAG) == begun["process"] or _is_dead(run):
            return run_id
        if _is_dead(run) is None and patient and self._seen.setdefault(run_id, lease) == lease:
            raise NotYetKnown
        return None  # somebody is at it: what this process does is another run

    def _create(self, experiment: str, begun: Mapping[str, Any], tags: Mapping[str, str]) -> str:
        return self.client.create_run(experiment, begun["time"], dict(tags), begun["open"]).info.run_id

    def _reopen(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.client.update_run(run_id, "RUNNING")
        if "error" in self.client.get_run(run_id).data.tags:
            self.client.delete_tag(run_id, "error")
        self.tag(run_id, tags)

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags in one request."""
        from mlflow.entities import RunTag

        self.client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def renew(self, run_id: str) -> None:
        """Tell other hosts that this process is alive."""
        self.client.set_tag(run_id, LEASE_TAG, _lease())

    def parameters(self, run_id: str) -> dict[str, str]:
        """What is recorded."""
        return dict(self.client.get_run(run_id).data.params)

    def close(self, run_id: str, status: str, stamp: int | None = None) -> None:
        """End a run, and as FAILED its children that are still open."""
        experiment = self.client.get_run(run_id).info.experiment_id
        for child in self.client.search_runs([experiment], f"tags.\"{PARENT_TAG}\" = '{run_id}' and attributes.status = 'RUNNING'"):
            self.close(child.info.run_id, "FAILED", stamp)
        self.client.set_terminated(run_id, status, stamp)

    def close_of(self, run_id: str, process: str) -> None:
        """End as FAILED the run of a process that is gone, unless another one has taken it over."""
        run = self.client.get_run(run_id)
        if run.info.status == "RUNNING" and run.data.tags.get(PROCESS_TAG) == process:
            self.close(run_id, "FAILED")

    def close_dead(self) -> None:
        """End as FAILED the runs whose process was killed: one of this machine that is gone, or of another whose lease has run out."""
        for run in self.client.search_runs([self.experiment], "attributes.status = 'RUNNING'"):
            if PROCESS_TAG in run.data.tags and _is_dead(run):
                self.close(run.info.run_id, "FAILED")


def _lease() -> str:
    return f"{time.time() + LEASE_SECONDS:.0f}"


def connect(uri: str, experiment: Any, given: str | None = None, seconds: float = 9.0) -> Store:
    """Reach the store and find or make the experiment in it.

    Args:
        uri: a server's address or a sqlite file, which is made where it is missing.
        experiment: the section ``tracking.experiment`` of mlflow.yml.
        given: a run of an orchestrator that must be there.
        seconds: how long to try.

    Raises:
        UserError: it cannot be reached in time, or the given run is not there.
    """
    # MLflow's own patience is minutes a request. Ours is the journal.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it prints the address with its password
    make_database(uri)
    follow_moved_project(uri)
    found: list[Store | Exception] = []

    def reach() -> None:
        try:
            client = MlflowClient(uri)
            found.append(Store(client, uri, _experiment(client, experiment)))
            if given:
                _check_given(client, given, uri)
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=reach, daemon=True)
    thread.start()
    thread.join(60 if sqlite_file(uri) else seconds)
    result = found[-1] if found and not thread.is_alive() else TimeoutError(f"no answer within {seconds:.0f} seconds")
    if isinstance(result, Store):
        return result
    if isinstance(result, UserError):
        raise result
    raise UserError(
        f"MLflow at {masked(uri)} cannot be used ({reason(result)}), so start it, correct MLFLOW_TRACKING_URI, "
        "or set HYPERSD_TRACKING=offline to record in a file and send it later."
    ) from None


def _experiment(client: MlflowClient, options: Any) -> str:
    found = client.get_experiment_by_name(options.name)
    if found is None:
        kwargs = options.create_experiment_kwargs
        try:
            return client.create_experiment(options.name, kwargs.artifact_location, kwargs.tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return _experiment(client, options)  # another first run was faster
    if found.lifecycle_stage == "deleted":
        if not options.restore_if_deleted:
            raise UserError(f"mlflow.yml: tracking.experiment.name: '{options.name}' is deleted, so restore it or choose another name.")
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def _check_given(client: MlflowClient, run_id: str, uri: str) -> None:
    try:
        there = client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        there = False
    if not there:
        raise UserError(f"MLFLOW_RUN_ID: there is no run '{run_id}' at {masked(uri)}, so correct it or unset it.")


def reason(error: BaseException) -> str:
    """The root of `error` in a few masked words."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    words = " ".join(str(error).split()) or type(error).__name__
    return masked(words if len(words) <= 200 else f"{words[:197]}...")
