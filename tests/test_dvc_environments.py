"""DVC's stages for any environment, the one MLflow run that they share, and how a stage finds ``kedro``."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import yaml
from kedro.io import AbstractDataset
from mlflow import MlflowClient
from servers import environment_of

from hypersd_pipeline import dvc_stages, settings
from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.results import MODELS, short_table

ROOT = Path(__file__).parents[1]


def loader_of(root: Path, env: str) -> ProjectConfigLoader:
    return ProjectConfigLoader(str(root / "conf"), env=env, **settings.CONFIG_LOADER_ARGS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The project's configuration with an environment of a user, and its dvc.yaml."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    (tmp_path / "conf/mine").mkdir()
    (tmp_path / "conf/mine/parameters.yml").write_text("extends: trial\ntscd_k2: {like: fast, stage: {loop: {steps: 3}}}\n")
    (tmp_path / "conf/mine/parameters_fast.yml").write_text("fast: {stage: {loop: {learning_rate: 1.0e-4}}}\n")
    return tmp_path


def stages_of(root: Path, env: str) -> dict[str, Any]:
    return dvc_stages.stages_of(root, loader_of(root, env))["stages"]


# --- stages ------------------------------------------------------------------------------------------------------------------------------


def test_a_stage_runs_with_the_environment_in_its_own_data_folder(root):
    ours, base = stages_of(root, "mine"), yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    assert list(ours) == list(base)
    stage = ours["tscd_k4"]
    assert stage["cmd"] == "bin/kedro run --env mine --pipelines tscd --nodes tscd_k4.train" and stage["wdir"] == "../.."
    assert stage["outs"][0] == "data/mine/06_models/lora_k4"
    assert {"data/mine/06_models/lora_k8", "src/hypersd_pipeline/data"} <= set(stage["deps"])
    text = yaml.safe_dump(ours)
    assert "data/0" not in text and "--env base" not in text
    assert {"data/mine/03_primary/dataset": {"persist": True}}.items() <= ours["data_prep"]["outs"][0].items()


def test_a_stage_tracks_its_sections_in_every_file_that_sets_them(root):
    trial = yaml.safe_load((root / "conf/trial/parameters.yml").read_text())
    tracked = {file: keys for entry in stages_of(root, "mine")["tscd_k2"]["params"] for file, keys in entry.items()}
    assert set(tracked["conf/base/parameters_tscd.yml"]) == {"tscd", "tscd_k2"}
    assert tracked["conf/mine/parameters.yml"] == ["tscd_k2"]
    assert tracked["conf/mine/parameters_fast.yml"] == ["fast"]  # tscd_k2 is like it here
    assert set(tracked.get("conf/trial/parameters.yml", [])) == {"tscd", "tscd_k2", "teacher", "compute"} & trial.keys()
    other = {file for entry in stages_of(root, "mine")["tscd_k4"]["params"] for file in entry}
    assert "conf/mine/parameters.yml" not in other


def test_the_file_is_written_where_it_is_out_of_date(root):
    path = dvc_stages.write_stages(root, loader_of(root, "mine"))
    assert path == root / "conf/mine/dvc.yaml" and "kedro repro --env mine" in path.read_text()
    before = path.stat().st_mtime_ns
    assert dvc_stages.write_stages(root, loader_of(root, "mine")).stat().st_mtime_ns == before
    (root / "conf/mine/parameters_x.yml").write_text("feedback: {stage: {loop: {steps: 3}}}\n")
    dvc_stages.write_stages(root, loader_of(root, "mine"))
    params = yaml.safe_load(path.read_text())["stages"]["feedback"]["params"]
    assert {"conf/mine/parameters_x.yml": ["feedback"]} in params


def test_base_keeps_the_file_of_the_project(root):
    text = (root / "dvc.yaml").read_text()
    assert dvc_stages.write_stages(root, loader_of(root, "base")) == root / "dvc.yaml"
    assert (root / "dvc.yaml").read_text() == text and not (root / "conf/base/dvc.yaml").exists()
    (root / "dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"there is no dvc\.yaml, so call this in a checkout"):
        dvc_stages.write_stages(root, loader_of(root, "mine"))


def in_dvc(root: Path) -> None:
    from dvc.repo import Repo

    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    Repo.init(str(root), no_scm=False).close()


@pytest.mark.parametrize(
    "env", sorted(path.name for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name not in ("base", "local"))
)
def test_dvc_reads_the_stages_of_every_environment(root, env):
    """DVC's own parser, and its check that no two stages make the same file."""
    from dvc.repo import Repo

    in_dvc(root)
    dvc_stages.write_stages(root, loader_of(root, env))
    with Repo(str(root)) as repo:
        found = [stage for stage in repo.index.stages if stage.path_in_repo == f"conf/{env}/dvc.yaml"]
        assert len(found) == len(yaml.safe_load((root / "dvc.yaml").read_text())["stages"])
        assert {Path(str(out)).parts[:2] for stage in found for out in stage.outs} == {("data", env)}


@pytest.mark.parametrize("env", ["base", "mine"])
def test_metrics_are_a_line_a_model_that_fits_a_terminal(root, env):
    """The table of the default's models and numbers of steps, with digits as they come, shown by DVC itself."""
    in_dvc(root)
    dvc_stages.write_stages(root, loader_of(root, env))
    rows = [("teacher", 25), ("teacher", 4), *((model, n) for model, steps in MODELS.items() for n in steps)]
    scores = {"fd_x_real": 12345.678901, "fd_x_recon": 9876.543219, "fd_x_crop_recon": 1.0}
    scores |= {"clip_score": 29.12345678, "image_quality": -2.123456789, "diversity": 0.1234567, "teacher_distance": 1.0}
    picked = {f"{model}_{n}_steps": {name: value + n for name, value in scores.items()} for model, n in rows}
    loader = loader_of(root, env)
    with chdir(root):
        entry = loader["catalog"]["results_by_model"]
        AbstractDataset.from_config("results_by_model", entry).save(short_table(picked, dict.fromkeys(MODELS, 1234.5678)))
    show = [sys.executable, "-m", "dvc", "metrics", "show", *([] if env == "base" else [f"data/{env}/08_reporting/table"])]
    head, *lines = subprocess.run(show, cwd=root, capture_output=True, text=True, check=True).stdout.rstrip().splitlines()
    assert head.split() == ["Path", "clip", "diversity", "fd", "quality", "ratio", "seconds"]
    assert len(lines) == len(rows) and max(map(len, [head, *lines])) <= 100 + len({"base": "", "mine": "mine/"}[env])
    (line,) = (line.split() for line in lines if "unified_8.json" in line)
    assert line[1:] == ["37.12", "8.123", "9885.0", "5.877", "0.9983", "1235.0"]


# --- one run in MLflow -------------------------------------------------------------------------------------------------------------------


def runs_of(folder: Path) -> dict[str, Any]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("hypersd")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.mark.parametrize("environment", [{"DVC_STAGE": "x"}, {"HYPERSD_PIPELINE_ID": "night 7"}], ids=["dvc", "given"])
def test_the_stages_of_a_pipeline_share_one_run(small_project, kedro, environment):
    environment = environment | {"DVC_ROOT": str(small_project)}
    for stage in ("tscd_k2", "tscd_k1"):
        done = kedro(small_project, "run", "--namespaces", stage, **environment)
        assert done.returncode == 0, done.stderr
    runs = runs_of(small_project)
    (parent,) = (run for name, run in runs.items() if not name.startswith("tscd"))
    assert {name for name in runs if name.startswith("tscd")} == {"tscd_k2", "tscd_k1"}
    assert {run.data.tags["mlflow.parentRunId"] for name, run in runs.items() if name.startswith("tscd")} == {parent.info.run_id}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert parent.data.tags["pipeline_id"] == parent.info.run_name == environment.get("HYPERSD_PIPELINE_ID", parent.info.run_name)
    assert all("fid/4" in run.data.metrics for name, run in runs.items() if name.startswith("tscd"))


def test_a_run_is_shared_until_its_last_stage_and_an_experiment_has_its_name(tmp_path):
    from hypersd_pipeline.io.journal import end_shared_run, shared_run

    assert shared_run(tmp_path, {}) is None
    first = shared_run(tmp_path, {"DVC_STAGE": "tscd_k8"})
    assert first == shared_run(tmp_path, {"DVC_STAGE": "tscd_k4"}) and first.startswith("dvc-")
    assert shared_run(tmp_path, {"DVC_STAGE": "tscd_k8", "DVC_EXP_NAME": "small-lr"}) == "dvc-exp-small-lr"
    end_shared_run(tmp_path)
    assert shared_run(tmp_path, {"DVC_STAGE": "tscd_k8"}) != first


# --- the command -------------------------------------------------------------------------------------------------------------------------


def fake_kedro(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "{path.parent.parent.name}: $@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("where", ["HYPERSD_KEDRO", "VIRTUAL_ENV", ".venv", "PATH"])
def test_a_stage_finds_kedro_where_no_environment_is_active(tmp_path, where):
    environment = {"PATH": "/usr/bin:/bin", "DVC_ROOT": str(tmp_path)}
    folder = tmp_path / (where if where.startswith(".") else f"own {where}")
    made = fake_kedro(folder / "bin" / "kedro")
    environment |= {"HYPERSD_KEDRO": {"HYPERSD_KEDRO": str(made)}, "VIRTUAL_ENV": {"VIRTUAL_ENV": str(folder)}, ".venv": {}}.get(
        where, {"PATH": f"/usr/bin:/bin:{made.parent}"}
    )
    done = subprocess.run([str(ROOT / "bin/kedro"), "run", "--env", "base"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{folder.name}: run --env base\n"


def test_without_kedro_a_stage_says_what_to_do(tmp_path):
    done = subprocess.run([str(ROOT / "bin/kedro"), "run"], env={"PATH": "/usr/bin:/bin"}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 127 and "activate the virtual environment" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_environment_is_one_sentence():
    environment = environment_of()
    done = subprocess.run(
        [sys.executable, "-m", "kedro", "repro", "--env", "mien"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "There is no environment 'mien'" in done.stderr and "Traceback" not in done.stderr
