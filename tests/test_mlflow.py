"""MLflow runs of the small project, in a real sqlite file."""

import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from hypersd_pipeline import checks
from hypersd_pipeline.errors import UserError

JOURNALS = "data/08_reporting/tracking"


def all_runs(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hypersd")
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def runs_of(folder: Path) -> dict[str, Run]:
    return {run.info.run_name: run for run in all_runs(folder)}


def steps_of(folder: Path, run: Run, metric: str) -> list[int]:
    history = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").get_metric_history(run.info.run_id, metric)
    return sorted(point.step for point in history)


def test_a_run_has_a_child_per_stage_with_curves_metrics_parameters_and_artifacts(small_project, kedro):
    done = kedro(small_project, "run")
    assert done.returncode == 0, done.stderr
    runs = runs_of(small_project)
    assert set(runs) == {"full_distill", "tscd_k2", "tscd_k1"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent, child = runs["full_distill"], runs["tscd_k2"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    # Metrics are in the child. Text and non-finite numbers are left out.
    assert child.data.metrics == {"train/loss": pytest.approx(1 / 3), "fid/4": 20, "interval/0": 1, "interval/1": 2}
    assert parent.data.metrics and {name.partition("/")[0] for name in parent.data.metrics} == {"system"}
    assert child.data.params == {"stage.segments": "2", "stage.steps": "3"}
    assert parent.data.params["tscd_k1.stage.segments"] == "1"
    assert {"git_commit", "git_dirty", "environment", "torch", "process", "run_key", "lease"} <= set(parent.data.tags)
    place = f"#/experiments/{parent.info.experiment_id}/runs/{parent.info.run_id}"
    assert "`mlflow server --backend-store-uri sqlite:///mlflow.db`" in done.stderr and place in done.stderr
    assert [path.name for path in (small_project / JOURNALS).iterdir() if path.name.startswith("20")] == []  # all is sent
    client = MlflowClient(f"sqlite:///{small_project / 'mlflow.db'}")
    assert [point.step for point in client.get_metric_history(child.info.run_id, "train/loss")] == [0, 1, 2]
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["metrics_k2.json"]
    assert (small_project / "data" / "tscd_k2.csv").read_text().splitlines()[:2] == ["step,train/loss,bad", "0,1.0,nan"]


def test_a_run_is_named_after_what_was_changed(small_project, kedro):
    assert kedro(small_project, "run", "--namespaces", "tscd_k1", "--params", "tscd_k1.stage.steps=2").returncode == 0
    assert set(runs_of(small_project)) == {"full_distill tscd_k1 tscd_k1.stage.steps=2", "tscd_k1"}


def test_a_failed_run_is_failed_with_its_child_and_keeps_its_curve(small_project, kedro):
    done = kedro(small_project, "run", "--namespaces", "tscd_k2", FAIL="2")
    assert done.returncode == 1 and "The same command continues this run." in done.stderr
    runs = runs_of(small_project)
    assert {name: run.info.status for name, run in runs.items()} == {"full_distill tscd_k2": "FAILED", "tscd_k2": "FAILED"}
    assert runs["full_distill tscd_k2"].data.tags["error"] == "UserError: row 7 of data.csv is empty; remove it."
    assert runs["tscd_k2"].data.metrics["train/loss"] == pytest.approx(1 / 3)


def test_a_terminated_run_is_failed(small_project, kedro):
    assert kedro(small_project, "run", "--namespaces", "tscd_k2", KILL="2", SIGNAL=str(int(signal.SIGTERM))).returncode != 0
    assert {run.info.status for run in runs_of(small_project).values()} == {"FAILED"}


def test_a_killed_run_is_closed_by_any_other_and_continued_by_the_same_command(small_project, kedro):
    killed = {"KILL": "2", "KILL_STEP": "1", "SIGNAL": str(int(signal.SIGKILL)), "PAUSE": "0.7"}
    assert kedro(small_project, "run", **killed).returncode == -signal.SIGKILL
    assert list((small_project / JOURNALS).glob("*.jsonl"))
    assert kedro(small_project, "run", "--pipelines", "data_prep").returncode == 0
    first = runs_of(small_project)
    assert {name: run.info.status for name, run in first.items()} == {
        "full_distill": "FAILED",
        "tscd_k1": "FINISHED",  # stages run in the order of their names here
        "tscd_k2": "FAILED",
        "data_prep": "FINISHED",
    }
    assert not list((small_project / JOURNALS).glob("*.jsonl"))  # the other run sent it

    assert kedro(small_project, "run", START="1").returncode == 0
    second = runs_of(small_project)
    assert {name: run.info.run_id for name, run in second.items()} == {name: run.info.run_id for name, run in first.items()}
    assert {run.info.status for run in second.values()} == {"FINISHED"}
    assert steps_of(small_project, second["tscd_k2"], "train/loss") == [0, 1, 1, 2]
    assert [line.partition(",")[0] for line in (small_project / "data/tscd_k2.csv").read_text().splitlines()] == ["step", "0", "1", "2"]


def test_a_run_of_an_orchestrator_takes_two_calls_with_other_parameters(small_project, kedro):
    client = MlflowClient(f"sqlite:///{small_project / 'mlflow.db'}")
    run_id = client.create_run(client.create_experiment("hypersd"), run_name="orchestrator").info.run_id
    assert kedro(small_project, "run", "--pipelines", "data_prep", MLFLOW_RUN_ID=run_id).returncode == 0
    done = kedro(small_project, "run", "--pipelines", "data_prep", "--params", "size=5", MLFLOW_RUN_ID=run_id)
    assert done.returncode == 0 and "recorded as size.2" in done.stderr, done.stderr
    (run,) = all_runs(small_project)
    assert (run.info.run_name, run.info.status) == ("orchestrator", "FINISHED")
    assert run.data.params == {"size": "4", "size.2": "5"}


def test_a_runner_that_works_on_nodes_beside_each_other_is_refused_before_anything_runs(small_project, kedro):
    done = kedro(small_project, "run", "--runner", "ThreadRunner")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Error: --runner ThreadRunner: nodes run one after another" in done.stderr
    assert not (small_project / "data/tscd_k2.csv").exists() and not all_runs(small_project)


def test_which_runners_are_refused():
    with pytest.raises(UserError, match="--async: nodes run one after another"):
        checks.check_runner(None, is_async=True)
    for accepted in (None, "SequentialRunner", "kedro.runner.SequentialRunner", "<kedro.runner.sequential_runner.SequentialRunner object>"):
        checks.check_runner(accepted)
    for refused in ("ParallelRunner", "kedro.runner.ThreadRunner", "Nonsense", "<kedro.runner.parallel_runner.ParallelRunner object at 0>"):
        with pytest.raises(UserError, match="so "):
            checks.check_runner(refused)


def test_the_tracking_uri_of_the_environment_is_respected(small_project, kedro, tmp_path):
    uri = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    assert kedro(small_project, "run", "--pipelines", "data_prep", MLFLOW_TRACKING_URI=uri).returncode == 0
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("hypersd")
    assert [run.info.run_name for run in client.search_runs([experiment.experiment_id])] == ["data_prep"]
    assert MlflowClient(f"sqlite:///{small_project / 'mlflow.db'}").get_experiment_by_name("hypersd") is None
