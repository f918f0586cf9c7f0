"""DVC as a team uses it: a real S3 server as remote, a colleague's clone, queued experiments, and what changed between commits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from servers import bucket, environment_of

ROOT = Path(__file__).parents[1]
SECRET = "a-secret-of-the-bucket"
Run = Callable[..., str]


def stage(name: str, before: list[str]) -> dict[str, Any]:
    return {
        "cmd": f"bin/kedro run --env base --pipelines full_distill --namespaces tscd_{name}",
        "deps": ["src/small", "raw/rows.json", *before],
        "params": [{"conf/base/parameters.yml": [f"tscd_{name}"]}],
        "outs": [{f"data/out/tscd_{name}.csv": {"persist": True}}],
        "metrics": [{f"data/out/metrics_{name}.json": {"cache": False}}],
    }


@pytest.fixture
def run() -> Iterator[Run]:
    """``run(folder, "dvc", ...)``: what the command of this installation prints. It has to end well."""
    scripts = Path(sys.executable).parent
    environment = environment_of(PATH=f"{scripts}{os.pathsep}{os.environ['PATH']}", GIT_CONFIG_GLOBAL=os.devnull)
    environment |= {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def call(folder: Path, *command: str) -> str:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    with bucket("models", SECRET) as (_, reached):
        environment |= reached
        yield call


@pytest.fixture
def project(small_project: Path, run: Run) -> Path:
    """The small project as a git repository with two stages, an environment of a user, and the bucket as its remote."""
    (small_project / "bin").mkdir()
    shutil.copy(ROOT / "bin/kedro", small_project / "bin")
    (small_project / "conf/mine").mkdir()
    (small_project / "conf/mine/parameters.yml").write_text("tscd_k1: {stage: {steps: 2}}\n")
    catalog = small_project / "conf/base/catalog.yml"
    rows = "metrics_data: {type: hypersd_pipeline.io.MetricsDataset, filepath: raw/rows.json}\n"
    catalog.write_text(catalog.read_text().replace("filepath: data/", "filepath: ${data:out}/") + rows)
    (small_project / "raw").mkdir()
    (small_project / "data/metrics_data.json").rename(small_project / "raw/rows.json")
    stages = {"stages": {"k2": stage("k2", []), "k1": stage("k1", ["data/out/metrics_k2.json"])}}
    curves = {f"data/out/tscd_{name}.csv": "train/loss" for name in ("k2", "k1")}
    content = stages | {"plots": [{"training loss": {"x": "step", "y": curves}}]}
    (small_project / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    ours = (ROOT / ".gitignore").read_text().replace("08_reporting/table/*", "out/metrics_*")
    (small_project / ".gitignore").write_text(f"{ours}*.db\n")
    run(small_project, "git", "init", "-q")
    run(small_project, "dvc", "init", "-q")
    run(small_project, "dvc", "remote", "add", "-q", "-d", "store", "s3://models/hypersd")
    run(small_project, "git", "add", "-A")
    run(small_project, "git", "commit", "-qm", "stages")
    return small_project


@pytest.mark.slow
def test_a_colleague_gets_results_of_any_environment_from_the_remote(project, run, tmp_path_factory):
    """Reproduce, push, clone, pull: the clone has the same files, and nothing to do."""
    assert "Running stage" in run(project, "kedro", "repro", "--env", "mine")
    run(project, "dvc", "push")
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "results")
    assert SECRET not in "".join(file.read_text(errors="replace") for file in (project / ".dvc").glob("config*"))

    clone = tmp_path_factory.mktemp("colleague") / "clone"
    run(project, "git", "clone", "-q", str(project), str(clone))
    for name in ("metrics_k2.json", "tscd_k1.csv"):
        assert not (clone / "data/mine/out" / name).exists()
    run(clone, "dvc", "pull", "conf/mine/dvc.yaml")
    for name in ("metrics_k2.json", "metrics_k1.json", "tscd_k2.csv", "tscd_k1.csv"):
        assert (clone / "data/mine/out" / name).read_bytes() == (project / "data/mine/out" / name).read_bytes()
    assert "up to date" in run(clone, "kedro", "repro", "--env", "mine")
    assert "Running" not in run(clone, "kedro", "repro", "--env", "mine", "k1")
    page = Path(run(clone, "dvc", "plots", "show").strip().removeprefix("file://"))
    assert "tscd_k1.csv" in page.read_text() and "tscd_k2.csv" in page.read_text()
    assert (clone / "data/mine/out/metrics_k1.json").is_file() and "20.0" in run(clone, "dvc", "metrics", "show")

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("hypersd").experiment_id])
    (parent,) = [found for found in runs if "mlflow.parentRunId" not in found.data.tags]
    assert parent.info.run_name.startswith("dvc-")
    assert all("fid/4" in found.data.metrics for found in runs if "mlflow.parentRunId" in found.data.tags)


@pytest.mark.slow
def test_queued_experiments_are_run_and_compared(project, run, tmp_path_factory):
    """``dvc exp run --queue``, ``dvc exp show``, ``dvc metrics diff`` and ``dvc plots diff``, as docs/mlflow_dvc.md shows them."""
    run(project, "dvc", "repro", "-q")
    run(project, "git", "add", "-A")
    run(project, "git", "commit", "-qm", "results")
    clone = tmp_path_factory.mktemp("clone") / "clone"
    run(project, "git", "clone", "-q", str(project), str(clone))
    assert run(clone, "dvc", "metrics", "show") == run(project, "dvc", "metrics", "show")  # nothing was pulled: git has them
    change = "conf/base/parameters.yml:tscd_k1.stage.segments=4"
    run(project, "dvc", "exp", "run", "--queue", "--name", "four", "--set-param", change)
    assert "four" in run(project, "dvc", "queue", "status")
    run(project, "dvc", "exp", "run", "--run-all")
    shown = json.loads(run(project, "dvc", "exp", "show", "--json"))
    assert "four" in json.dumps(shown)

    run(project, "dvc", "exp", "apply", "four")
    diff = json.loads(run(project, "dvc", "metrics", "diff", "--json"))
    assert diff["data/out/metrics_k1.json"]["fid.4"] == {"old": 10.0, "new": 40.0, "diff": 30.0}
    assert "data/out/metrics_k2.json" not in diff
    page = Path(run(project, "dvc", "plots", "diff", "HEAD").strip().removeprefix("file://"))
    assert "tscd_k1.csv" in page.read_text()
