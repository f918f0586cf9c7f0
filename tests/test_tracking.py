"""The journal, its way into MLflow, outages, secrets, the making of the sqlite file, and which run a process continues."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from PIL import Image
from servers import Server, environment_of

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import lock
from hypersd_pipeline.io import mlflow_store
from hypersd_pipeline.io.journal import Delivery, Journal, Sender, folder_id, send_left
from hypersd_pipeline.io.machine import MachineMonitor, seconds_between
from hypersd_pipeline.io.mlflow_store import LEASE_TAG, PROCESS_TAG, NotYetKnown, Store, connect, make_database, this_process
from hypersd_pipeline.io.tracking import Recorder
from hypersd_pipeline.logs import about, prepare_logs
from hypersd_pipeline.masking import masked

SECRET = "hunter2-and-more"
JOURNALS = "data/08_reporting/tracking"
OPTIONS = SimpleNamespace(
    name="hypersd", restore_if_deleted=True, create_experiment_kwargs=SimpleNamespace(artifact_location=None, tags=None)
)


def begun(**changed: object) -> dict[str, object]:
    """The first entry of a journal."""
    return {"open": "tscd", "key": "k", "given": None, "process": this_process(), "time": 1000, "tags": {}} | changed


@pytest.fixture
def store(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A sqlite store. Artifacts go to the test's folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "store.db")
    return connect(f"sqlite:///{tmp_path / 'store.db'}", OPTIONS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where journals lie."""
    return tmp_path / "tracking"


def history(store: Store, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in store.client.get_metric_history(run_id, name))


def until(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


# --- the journal and its way into MLflow -------------------------------------------------------------------------------------------------


def test_an_entry_is_on_disk_at_once_and_in_mlflow_once(folder: Path, store: Store, tmp_path: Path) -> None:
    recorder = Recorder(Journal(folder, begun()))
    recorder.open("tscd_k4", {"stage": "tscd_k4"})
    recorder.parameters({"stage": {"steps": 3, "guidance": [3.0, 9.0]}})
    for step in range(3):
        recorder.metrics({"loss": 0.5}, step)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "weights").write_text("w")
    recorder.artifact(str(tmp_path / "lora"), "lora_k4")
    recorder.artifact(str(tmp_path / "nothing"), "nothing")
    recorder.close_all("FINISHED")
    path = recorder.journal.path
    assert len(path.read_text().splitlines()) == 10

    def send() -> Delivery:
        delivery = Delivery(path, store)
        delivery.all()
        assert delivery.left == 0
        return delivery

    first = send()
    offset = path.with_suffix(".sent")
    state = json.loads(offset.read_text())
    offset.write_text(json.dumps(state | {"offset": len(path.open("rb").readline())}))  # as if killed before the offset was written
    assert send().runs == first.runs
    child, parent = first.runs["1"], first.runs["0"]
    assert not history(store, parent, "loss") and history(store, child, "loss") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    run = store.client.get_run(child)
    assert run.data.params == {"stage.steps": "3", "stage.guidance": "[3.0, 9.0]"} and run.info.status == "FINISHED"
    assert [file.path for file in store.client.list_artifacts(child, "lora_k4")] == ["lora_k4/weights"]
    assert "nothing" in path.with_suffix(".refused").read_text() and first.refused == 1
    recorder.journal.close()


def test_data_and_images_are_shown_by_mlflow(folder: Path, store: Store, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "grid_k4.png")
    (tmp_path / "broken.png").write_text("no image")
    recorder = Recorder(Journal(folder, begun()))
    recorder.dataset("latents", "d" * 64, '{"folder": "data"}')
    recorder.image(str(tmp_path / "grid_k4.png"), "grid_k4")
    recorder.image(str(tmp_path / "broken.png"), "broken")
    recorder.headline({"lower is better/k4 4 steps fd_efficientnet_lite0_recon": 3.0})
    recorder.close_all("FINISHED")
    delivery = Delivery(recorder.journal.path, store)
    delivery.all()
    recorder.journal.close()
    run = store.client.get_run(delivery.runs["0"])
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest, given.tags[0].value) == ("latents", "d" * 36, "training")
    assert run.data.metrics == {"lower is better/k4 4 steps fd_efficientnet_lite0_recon": 3.0}
    assert any("grid_k4" in file.path for file in store.client.list_artifacts(run.info.run_id, "images"))
    assert delivery.refused == 1 and "broken" in recorder.journal.path.with_suffix(".refused").read_text()


def test_the_use_of_the_machine_is_measured_until_the_end() -> None:
    points: list[tuple[int, set[str]]] = []
    monitor = MachineMonitor(lambda values, step: points.append((step, set(values))), seconds=0.05)
    until(lambda: len(points) > 1)
    monitor.finish()
    assert [step for step, _ in points] == list(range(len(points)))
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= points[-1][1]
    assert seconds_between({}) == 10 and seconds_between({"MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false"}) is None
    with pytest.raises(UserError, match="MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL: '-1' is no positive number"):
        seconds_between({"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "-1"})


def test_a_torn_line_and_a_deleted_run_stop_nothing(folder: Path, store: Store) -> None:
    recorder = Recorder(Journal(folder, begun()))
    recorder.tags({"a": "b"})
    recorder.journal.close()
    path = recorder.journal.path
    with path.open("a") as file:
        file.write('{"run": "0", "me\n{"run": "7", "metrics": {"x": 1}, "step": 0, "time": 1}\n{"run": "0", "tags": {"c": "d"}}\n{"run"')
    assert send_left(folder, store) == (1, 1)
    (run,) = store.client.search_runs([store.experiment])
    assert run.data.tags["a"] == "b" and run.data.tags["c"] == "d" and run.info.status == "FAILED"
    assert [file.suffix for file in folder.iterdir()] == [".refused"]


def test_a_living_process_keeps_its_journal_to_itself(folder: Path, store: Store) -> None:
    journal = Journal(folder, begun())
    assert send_left(folder, store) == (0, 0)
    with (
        pytest.raises(UserError, match=rf"process {os.getpid()} on {socket.gethostname()} is at it"),
        lock(journal.path.with_suffix(".lock"), "x"),
    ):
        pass
    journal.close()
    assert send_left(folder, store) == (1, 0)


def test_a_full_disk_is_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(folder, begun())
    journal._file = open("/dev/full", "w")
    for _ in range(3):
        journal.write({"run": "0", "tags": {}})
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text


def test_a_data_folder_has_a_name_that_moves_with_it(tmp_path: Path) -> None:
    name = folder_id(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert folder_id(tmp_path / "b") == name != folder_id(tmp_path / "a")


def test_a_server_that_stops_and_comes_back_gets_everything_once_and_nobody_waits(folder: Path, server: Server) -> None:
    server.start()
    store = connect(server.uri, OPTIONS)
    recorder = Recorder(Journal(folder, begun()))
    sender = Sender(recorder.journal, store, pause=0.05)
    slowest = 0.0

    def train(steps: range) -> None:
        nonlocal slowest
        for step in steps:
            start = time.monotonic()
            recorder.metrics({"loss": float(step)}, step)
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.002)

    train(range(100))
    until(lambda: sender.delivery.runs and not sender.delivery.left)
    server.stop()
    train(range(100, 300))
    until(lambda: sender.failure)
    server.start()
    train(range(300, 400))
    recorder.close_all("FINISHED")
    assert sender.finish(30) and slowest < 0.5
    run = store.client.get_run(sender.delivery.runs["0"])
    assert run.info.status == "FINISHED"
    points = store.client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in points] == list(range(400))
    assert not [file for file in folder.iterdir() if file.name.startswith("20")]


def test_training_outlives_a_server_and_the_next_run_sends_what_was_kept(
    small_project: Path, kedro: Callable[..., object], server: Server
) -> None:
    server.start()
    user = server.uri.replace("://", f"://somebody:{SECRET}@")
    command = [sys.executable, "-m", "kedro", "run"]
    variables = environment_of(PAUSE="0.8", MLFLOW_TRACKING_URI=user)
    process = subprocess.Popen(command, cwd=small_project, env=variables, stderr=subprocess.PIPE, text=True)
    until(lambda: (small_project / "data/tscd_k1.csv").exists(), 300)
    server.stop()
    told = process.communicate(timeout=300)[1]
    assert process.returncode == 0, told
    warnings = [line for line in told.splitlines() if "WARNING" in line and "such values are not recorded" not in line]
    (journal,) = (small_project / JOURNALS).glob("*.jsonl")
    assert len(warnings) == 1 and journal.name in warnings[0] and "`kedro tracking send`" in warnings[0], told

    server.start()
    done = kedro(small_project, "run", "--pipelines", "data_prep", MLFLOW_TRACKING_URI=user)
    assert done.returncode == 0 and "/#/experiments/" in done.stderr, done.stderr
    client = MlflowClient(server.uri)
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("hypersd").experiment_id])}
    assert set(runs) == {"full_distill", "tscd_k1", "tscd_k2", "data_prep"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for stage in ("tscd_k1", "tscd_k2"):
        assert [point.step for point in client.get_metric_history(runs[stage].info.run_id, "train/loss")] == [0, 1, 2]
        assert [file.path for file in client.list_artifacts(runs[stage].info.run_id)] == [f"metrics_{stage[5:]}.json"]
    assert_no_secret(small_project, told + done.stderr + done.stdout)


def assert_no_secret(root: Path, *texts: str) -> None:
    for text in texts:
        assert SECRET not in text
    for file in root.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


# --- a server that is not there ----------------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_one_sentence_or_a_journal(small_project: Path, kedro: Callable[..., object]) -> None:
    uri, shown = f"http://somebody:{SECRET}@127.0.0.1:9", "http://***@127.0.0.1:9"
    secrets = {"MLFLOW_TRACKING_TOKEN": SECRET, "MLFLOW_TRACKING_URI": uri}
    refused = kedro(small_project, "run", **secrets)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"Error: MLflow at {shown} cannot be used ([Errno 111] Connection refused), so start it" in refused.stderr
    assert not (small_project / "data/tscd_k1.csv").exists()

    offline = kedro(small_project, "run", HYPERSD_TRACKING="offline", **secrets)
    assert offline.returncode == 0 and "Tracking is offline" in offline.stderr, offline.stderr
    assert_no_secret(small_project, refused.stderr, offline.stderr)
    sent = kedro(small_project, "tracking", "send")
    assert sent.returncode == 0 and "Sent 1 journal to sqlite:///" in sent.stdout, sent.stderr
    client = MlflowClient(f"sqlite:///{small_project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("hypersd").experiment_id])
    assert {(run.info.run_name, run.info.status) for run in runs} == {(name, "FINISHED") for name in ("full_distill", "tscd_k1", "tscd_k2")}


def test_a_server_that_does_not_answer_is_given_up_within_ten_seconds() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(UserError, match="no answer within 2 seconds"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}", OPTIONS, seconds=2)
        assert time.monotonic() - start < 4


def test_a_given_run_must_be_there(store: Store) -> None:
    with pytest.raises(UserError, match="MLFLOW_RUN_ID: there is no run 'ffff"):
        connect(store.uri, OPTIONS, "f" * 32)


# --- secrets -----------------------------------------------------------------------------------------------------------------------------


def test_secrets_are_masked_wherever_they_stand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sesame-open")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    monkeypatch.setenv("OTHER_URI", "postgresql://me:p%40ssword@host/db")
    for text, expected in {
        "see http://me:pass@host:5000/x": "see http://***@host:5000/x",
        "http://me:p@ss@host and http://token@host": "http://***@host and http://***@host",
        "key sesame-open!": "key ***!",
        "password p@ssword or p%40ssword": "password *** or ***",
        "https://host/file?token=abc&size=3": "https://host/file?token=***&size=3",
        "{'api_key': 'abc', 'size': 3}": "{'api_key': '***', 'size': 3}",
        "--params hf_token=abc,size=3": "--params hf_token=***,size=3",
        "parallel a@b.c https://host/a@b tokens: 77": "parallel a@b.c https://host/a@b tokens: 77",
    }.items():
        assert masked(text) == expected
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        prepare_logs()
        prepare_logs()
        try:
            raise ValueError("sesame-open")
        except ValueError:
            logging.getLogger("x").exception("at http://me:pass@host")
        with about("tscd_k4: lora_k4"):
            logging.getLogger("x").warning("%d %% done", 50)
        logging.getLogger("kedro.runner.sequential_runner").warning("You can resume the pipeline run by --from-nodes")
        logging.getLogger("x").warning("done")
    finally:
        logging.getLogger().removeHandler(handler)
    told = capsys.readouterr().err
    assert "http://***@host" in told and "ValueError: ***" in told and "sesame" not in told
    assert told.splitlines()[-2:] == ["[tscd_k4: lora_k4] 50 % done", "done"]


def test_a_library_may_change_the_environment_while_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "abcdefgh")
    done = threading.Event()

    def toggle() -> None:
        while not done.is_set():
            os.environ["A_LIBRARYS_OWN"] = "1"
            os.environ.pop("A_LIBRARYS_OWN")

    thread = threading.Thread(target=toggle)
    thread.start()
    try:
        assert {masked("abcdefgh") for _ in range(2000)} == {"***"}
    finally:
        done.set()
        thread.join()


# --- the sqlite file ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_at_any_moment_leave_a_database_or_none(tmp_path: Path) -> None:
    path, moments = tmp_path / "mlflow.db", random.Random(0)
    start = time.monotonic()
    make_database(f"sqlite:///{tmp_path / 'other.db'}")
    needed = time.monotonic() - start
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                make_database(f"sqlite:///{path}")
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, 1.1 * min(needed, 2.5)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert mlflow_store._state(path) in ("missing", "whole")
        path.unlink(missing_ok=True)
    make_database(f"sqlite:///{path}")
    assert connect(f"sqlite:///{path}", OPTIONS).experiment
    assert sorted(file.name for file in tmp_path.glob("mlflow.db*")) == ["mlflow.db", "mlflow.db.lock"]


def test_two_first_runs_at_once_both_finish(small_project: Path) -> None:
    (small_project / "mlflow.db").unlink()
    command = [sys.executable, "-m", "kedro", "run", "--pipelines", "data_prep", "--params"]
    processes = [
        subprocess.Popen([*command, f"size={size}"], cwd=small_project, env=environment_of(), stderr=subprocess.PIPE, text=True)
        for size in (5, 6)
    ]
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    client = MlflowClient(f"sqlite:///{small_project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("hypersd").experiment_id])
    assert sorted(run.data.params["size"] for run in runs) == ["5", "6"] and {run.info.status for run in runs} == {"FINISHED"}


def damage(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table _alembic_tmp_runs (x)")
    os.utime(path, (1, 1))


def test_a_half_made_database_without_runs_is_moved_aside(tmp_path: Path, empty_database: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copy(empty_database, path)
    damage(path)
    make_database(f"sqlite:///{path}")
    assert mlflow_store._state(path) == "whole" and "only half made" in caplog.text
    assert len(list(tmp_path.glob("mlflow.db.damaged-*"))) == 1


def test_a_database_with_runs_stays_where_it_is(store: Store) -> None:
    store.client.create_run(store.experiment)
    path = mlflow_store.sqlite_file(store.uri)
    damage(path)
    before = path.read_bytes()
    make_database(store.uri)
    assert path.read_bytes() == before
    path.write_text("no database")
    with pytest.raises(UserError, match="is no sqlite database"):
        make_database(store.uri)


def test_a_locked_database_stays_where_it_is(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_store, "_LOCKED_SECONDS", 0.1)
    path = tmp_path / "mlflow.db"
    shutil.copy(empty_database, path)
    damage(path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("begin exclusive")
    with pytest.raises(UserError, match="database is locked"):
        make_database(f"sqlite:///{path}")
    holder.close()
    assert not list(tmp_path.glob("*.damaged-*"))


# --- which run a process continues -------------------------------------------------------------------------------------------------------


def test_a_run_is_continued_unless_it_is_finished_or_somebody_is_at_it(store: Store) -> None:
    first = store.parent(begun(), patient=False)
    assert store.parent(begun(), patient=False) == first  # this process's own
    assert store.parent(begun(key="other"), patient=False) != first
    store.close(first, "FAILED")
    assert store.parent(begun(process="elsewhere/1/1"), patient=False) == first  # which is at it now, on another host
    with pytest.raises(NotYetKnown):
        store.parent(begun(), patient=True)
    store.tag(first, {LEASE_TAG: f"{time.time() - 1:.0f}"})
    assert store.parent(begun(), patient=True) == first  # its lease ran out: it is dead
    store.tag(first, {PROCESS_TAG: "elsewhere/1/1", LEASE_TAG: f"{time.time() + 60:.0f}"})
    second = store.parent(begun(), patient=True)
    assert second != first  # its lease was renewed: it is alive
    store.close(second, "FINISHED")
    assert store.parent(begun(), patient=True) not in (first, second)


def test_dead_processes_runs_are_closed_with_their_children(store: Store) -> None:
    parent = store.parent(begun(process="elsewhere/1/1"), patient=False)
    child = store.child(parent, {"open": "tscd_k4", "time": 1, "tags": {}})
    assert store.child(parent, {"open": "tscd_k4", "time": 2, "tags": {}}) == child
    foreign = store.client.create_run(store.experiment).info.run_id
    store.close_dead()
    assert store.client.get_run(parent).info.status == "RUNNING"
    store.tag(parent, {LEASE_TAG: "1"})
    store.close_dead()
    assert {store.client.get_run(run).info.status for run in (parent, child)} == {"FAILED"}
    assert store.client.get_run(foreign).info.status == "RUNNING"
