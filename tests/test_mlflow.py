"""MLflow runs of the small project, in a real sqlite file."""

import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run


def runs_of(folder: Path) -> dict[str, Run]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hypersd")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_a_run_has_a_child_per_stage_with_curves_metrics_parameters_and_artifacts(small_project, kedro):
    done = kedro(small_project, "run")
    assert done.returncode == 0, done.stderr
    runs = runs_of(small_project)
    assert set(runs) == {"full_distill", "tscd_k2", "tscd_k1"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent, child = runs["full_distill"], runs["tscd_k2"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    # Plain names in the child, the stage in front in the parent; text and non-finite numbers are left out.
    assert child.data.metrics == {"train/loss": pytest.approx(1 / 3), "fid/4": 20, "interval/0": 1, "interval/1": 2}
    assert parent.data.metrics["tscd_k1/fid/4"] == 10 and parent.data.metrics["tscd_k2/fid/4"] == 20
    assert child.data.params == {"stage.segments": "2", "stage.steps": "3"}
    assert parent.data.params["tscd_k1.stage.segments"] == "1"
    assert {"git_commit", "git_dirty", "environment", "torch", "process"} <= set(parent.data.tags)
    client = MlflowClient(f"sqlite:///{small_project / 'mlflow.db'}")
    assert [point.step for point in client.get_metric_history(child.info.run_id, "train/loss")] == [0, 1, 2]
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["metrics_k2.json"]
    assert (small_project / "data" / "tscd_k2.csv").read_text().splitlines()[:2] == ["step,train/loss,bad", "0,1.0,nan"]


def test_a_failed_run_is_failed_with_its_child_and_keeps_its_curve(small_project, kedro):
    done = kedro(small_project, "run", "--namespaces", "tscd_k2", FAIL="2")
    assert done.returncode == 1
    runs = runs_of(small_project)
    assert {name: run.info.status for name, run in runs.items()} == {"full_distill tscd_k2": "FAILED", "tscd_k2": "FAILED"}
    assert runs["full_distill tscd_k2"].data.tags["error"] == "UserError: row 7 of data.csv is empty; remove it."
    assert runs["tscd_k2"].data.metrics["train/loss"] == pytest.approx(1 / 3)


def test_a_terminated_run_is_failed(small_project, kedro):
    assert kedro(small_project, "run", "--namespaces", "tscd_k2", KILL="2", SIGNAL=str(int(signal.SIGTERM))).returncode != 0
    assert {run.info.status for run in runs_of(small_project).values()} == {"FAILED"}


def test_a_killed_run_is_failed_once_the_next_one_starts(small_project, kedro):
    done = kedro(small_project, "run", "--namespaces", "tscd_k2", KILL="2", SIGNAL=str(int(signal.SIGKILL)))
    assert done.returncode == -signal.SIGKILL
    killed = runs_of(small_project)
    assert {run.info.status for run in killed.values()} == {"RUNNING"}
    assert kedro(small_project, "run", "--pipelines", "data_prep").returncode == 0
    client = MlflowClient(f"sqlite:///{small_project / 'mlflow.db'}")
    assert {client.get_run(run.info.run_id).info.status for run in killed.values()} == {"FAILED"}


def test_the_tracking_uri_of_the_environment_is_respected(small_project, kedro, tmp_path):
    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    assert kedro(small_project, "run", "--pipelines", "data_prep", MLFLOW_TRACKING_URI=uri).returncode == 0
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("hypersd")
    assert [run.info.run_name for run in client.search_runs([experiment.experiment_id])] == ["data_prep"]
    assert MlflowClient(f"sqlite:///{small_project / 'mlflow.db'}").get_experiment_by_name("hypersd") is None
