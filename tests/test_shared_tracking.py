"""Tracking that teams share: a real MLflow server with Postgres and S3, two teams' projects, and a project that moves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from servers import POSTGRES, Server, bucket, postgres

from hypersd_pipeline.io.mlflow_store import follow_moved_project

PASSWORD, SECRET = "the-password-of-the-database", "the-secret-of-the-bucket"


@pytest.fixture
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """MLflow's server in front of both. Only it knows their passwords."""
    folder = tmp_path_factory.mktemp("shared")
    with postgres(folder / "postgres", PASSWORD) as database, bucket("mlflow", SECRET) as (_, reached):
        server = Server(database, "s3://mlflow/artifacts", reached)
        server.start()
        yield server
        server.stop()


@pytest.mark.slow
@pytest.mark.skipif(not POSTGRES, reason="needs Postgres: apt-get install postgresql")
def test_two_teams_share_a_server_with_postgres_and_s3(shared, small_project, kedro, tmp_path_factory, tmp_path):
    other = tmp_path_factory.mktemp("other") / "project"
    shutil.copytree(small_project, other)
    for project, run in ((small_project, "ours"), (other, "theirs")):
        done = kedro(project, "run", "--namespaces", "tscd_k2", "--params", f"mlflow_run_name={run}", MLFLOW_TRACKING_URI=shared.uri)
        assert done.returncode == 0, done.stderr
        assert f"see {shared.uri}/#/experiments/" in done.stdout + done.stderr
        assert not (project / "mlartifacts").exists()
        written = "".join(file.read_text(errors="replace") for file in project.rglob("*") if file.suffix in (".jsonl", ".yml", ".json"))
        assert PASSWORD not in written + done.stderr + done.stdout and SECRET not in written
    shutil.rmtree(other)  # what a team has deleted is still there for the other one
    client = MlflowClient(shared.uri)
    found = client.search_runs([client.get_experiment_by_name("hypersd").experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert {"ours", "theirs"} <= runs.keys()
    (child,) = (run for run in found if run.data.tags.get("mlflow.parentRunId") == runs["theirs"].info.run_id)
    assert child.data.metrics["fid/4"] == 20.0 and child.info.artifact_uri.startswith("mlflow-artifacts:/")
    (path,) = [file.path for file in client.list_artifacts(child.info.run_id) if file.path.endswith(".json")]
    assert '"4": 20.0' in Path(client.download_artifacts(child.info.run_id, path, str(tmp_path))).read_text()


# --- a project that moves ----------------------------------------------------------------------------------------------------------------


def project_with_run(folder: Path, empty_database: Path, artifacts: Path | None = None) -> tuple[MlflowClient, str]:
    """A database with one run that has an artifact."""
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.create_experiment("hypersd", (artifacts or folder / "mlartifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_text(run, "weights", "lora.txt")
    return client, run


@pytest.mark.parametrize("copied", [False, True], ids=["moved", "copied"])
def test_artifacts_are_found_after_the_project_has_moved(tmp_path, empty_database, copied):
    before, after = tmp_path / "a project's folder", tmp_path / "elsewhere"
    _, run = project_with_run(before, empty_database)
    (shutil.copytree if copied else shutil.move)(before, after)
    uri = f"sqlite:///{after / 'mlflow.db'}"
    follow_moved_project(uri)
    client = MlflowClient(uri)
    info = client.get_run(run).info
    assert info.artifact_uri == f"{(after / 'mlartifacts').as_uri()}/{run}/artifacts"
    assert client.get_experiment(info.experiment_id).artifact_location == (after / "mlartifacts").as_uri()
    assert Path(client.download_artifacts(run, "lora.txt")).read_text() == "weights"
    new = client.create_run(info.experiment_id).info
    assert new.artifact_uri.startswith((after / "mlartifacts").as_uri())


def test_a_location_that_somebody_chose_is_left_alone(tmp_path, empty_database):
    chosen = tmp_path / "chosen" / "mlartifacts"
    client, run = project_with_run(tmp_path / "project", empty_database, chosen)
    (tmp_path / "project" / "mlartifacts").mkdir()
    follow_moved_project(f"sqlite:///{tmp_path / 'project' / 'mlflow.db'}")
    assert client.get_run(run).info.artifact_uri.startswith(chosen.as_uri())
    follow_moved_project("http://127.0.0.1:5000")
    follow_moved_project(f"sqlite:///{tmp_path / 'missing.db'}")
    assert not (tmp_path / "missing.db").exists()
