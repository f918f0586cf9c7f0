"""What schedulers run: DAGs of Airflow made by the real kedro-airflow, systemd's units, the line for cron, the workflow for GitHub."""

from __future__ import annotations

import ast
import configparser
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from kedro.framework.project import pipelines
from kedro.framework.startup import bootstrap_project
from mlflow import MlflowClient
from servers import ROOT, environment_of

DEPLOY, DOCS = ROOT / "deploy", ROOT / "docs" / "schedulers.md"
CREATE = re.search(r"^kedro airflow create (.*)$", DOCS.read_text(), re.MULTILINE)[1]  # the command that readers are told
AIRFLOW = os.environ.get("HYPERSD_AIRFLOW", "")
"""Folder of a virtual environment with Airflow. The suite installs none: it is half a gigabyte."""


# --- Airflow -----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dag:
    """What the file of a DAG says, read without Airflow.

    Attributes:
        tasks: task -> its nodes and the tasks before it. keywords: of the call of ``DAG``, as source code.
    """

    text: str
    tasks: dict[str, tuple[list[str], list[str]]]
    run: str
    project: str
    keywords: dict[str, str]


def dags(folder: Path, *more: str, project: Path = ROOT, **environment: str) -> dict[str, Dag]:
    """What docs/schedulers.md tells to type, for the environment smoke: name of the file -> DAG."""
    arguments = shlex.split(CREATE.replace("--env sdxl", "--env smoke"))
    command = [sys.executable, "-m", "kedro", "airflow", "create", *arguments, "--target-dir", str(folder), *more]
    done = subprocess.run(command, cwd=project, env=environment_of(**environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.name: read(path) for path in folder.glob("*.py")}


def read(path: Path) -> Dag:
    tree = ast.parse(path.read_text())
    compile(tree, path.name, "exec")
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    tasks = {name: (nodes.split(","), before) for name, (nodes, before) in ast.literal_eval(values["TASKS"]).items()}
    (call,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "DAG"]
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}
    return Dag(path.read_text(), tasks, ast.literal_eval(values["RUN"]), ast.unparse(values["PROJECT"]), keywords)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dag]:
    return dags(tmp_path_factory.mktemp("dags"))


TASKS = {
    "full_distill": [
        *("data_prep", "prepare_reference", "evaluate_teacher", "tscd_k8", "tscd_k4", "tscd_k2", "tscd_k1"),
        *("feedback", "dmd", "one_step_unet", "summarise"),
    ],
    "retrain": ["data_prep", "retrain"],
}


@pytest.mark.parametrize("name", TASKS)
def test_a_stage_is_a_task_and_follows_what_it_reads(made: dict[str, Dag], name: str):
    dag = made[f"hypersd_pipeline_smoke_{name}_dag.py"]
    assert sorted(dag.tasks) == sorted(TASKS[name])
    bootstrap_project(ROOT)
    pipelines.set_requested(None)
    task_of = {node: task for task, (nodes, _) in dag.tasks.items() for node in nodes}
    assert sorted(task_of) == sorted(node.name for node in pipelines[name].nodes)
    assert len(task_of) == sum(len(nodes) for nodes, _ in dag.tasks.values())  # no node in two tasks
    read = {(task_of[a.name], task_of[b.name]) for a, before in pipelines[name].node_dependencies.items() for b in before}
    assert {(task, other) for task, (_, before) in dag.tasks.items() for other in before} == {(a, b) for a, b in read if a != b}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_command_of_the_project_that_is_tried_again(made: dict[str, Dag], name: str):
    dag = made[f"hypersd_pipeline_smoke_{name}_dag.py"]
    assert dag.run == f"exec bin/kedro run --env smoke --pipelines {name}"
    for nodes, _ in dag.tasks.values():
        assert parsed(shlex.split(f"{dag.run} --nodes {','.join(nodes)}")[1:])["node_names"] == nodes
    settings = yaml.safe_load((ROOT / "conf/base/airflow.yml").read_text())["default"]
    arguments = ast.parse(dag.keywords["default_args"], mode="eval").body
    assert isinstance(arguments, ast.Dict)
    default_args = {ast.literal_eval(key): ast.unparse(value) for key, value in zip(arguments.keys, arguments.values, strict=True)}  # type: ignore[arg-type]
    assert default_args["retries"] == str(settings["retries"]) == "3"
    assert default_args["retry_delay"] == f"timedelta(seconds={settings['retry_seconds']})"
    assert dag.keywords["max_active_runs"] == "1" and dag.keywords["catchup"] == "False"
    assert dag.keywords["schedule"] == {"retrain": "'0 2 * * 1'", "full_distill": "None"}[name]


def test_the_file_of_a_dag_names_no_folder_of_this_machine_unless_it_is_told_to(made: dict[str, Dag], tmp_path: Path):
    for dag in made.values():
        assert dag.project == "str(Path(__file__).resolve().parents[1])"
        assert not {place for place in (str(ROOT), str(tmp_path.parents[1]), str(Path.home()), sys.prefix) if place in dag.text}
    told = dags(tmp_path, "--params", "project=/srv/of 'ours',retries=1", "--conf-source", "other/conf")
    for name, dag in told.items():
        assert dag.project == repr("/srv/of 'ours'") and "'retries': 1" in dag.keywords["default_args"]
        assert dag.run.startswith("exec bin/kedro run --env smoke --conf-source other/conf --pipelines ") and dag.tasks == made[name].tasks


def copy_of_project(folder: Path) -> Path:
    """The project's code and configuration, in another place."""
    for name in ("conf", "src", "bin", "deploy"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", ".telemetry"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not AIRFLOW, reason="HYPERSD_AIRFLOW names no virtual environment with Airflow: docs/schedulers.md")
def test_airflow_runs_the_dag_and_a_task_that_was_killed_continues(tmp_path: Path):
    """`airflow dags test` of a retraining, whose first training is killed in the middle."""
    project = copy_of_project(tmp_path / "project")
    environment = environment_of(
        PYTHONPATH=os.pathsep.join([str(project / "src"), os.environ.get("PYTHONPATH", "")]),
        HYPERSD_KEDRO=str(Path(sys.executable).with_name("kedro")),
        AIRFLOW_HOME=str(tmp_path / "airflow"),
        AIRFLOW__CORE__LOAD_EXAMPLES="False",
        AIRFLOW__CORE__DAGS_FOLDER=str(project / "airflow_dags"),
    )
    dags(project / "airflow_dags", "--params", "retry_seconds=1", project=project, PYTHONPATH=environment["PYTHONPATH"])
    airflow = str(Path(AIRFLOW) / "bin" / "airflow")
    subprocess.run([airflow, "db", "migrate"], env=environment, check=True, capture_output=True)
    asked = '{"kedro_params": "retrain.scratch.k8.loop.steps=30"}'
    log = tmp_path / "airflow.log"
    with log.open("w") as file:
        command = [airflow, "dags", "test", "hypersd_pipeline_smoke_retrain", "--conf", asked]
        running = subprocess.Popen(command, cwd=project, env=environment, stdout=file, stderr=subprocess.STDOUT)
        stage = project / "data/smoke/06_models/checkpoints/retrain_k8"
        killed_at = 0
        while running.poll() is None:
            steps = [int(path.name.split("-")[1]) for path in stage.glob("*/step-*.pt")]
            if not killed_at and max(steps, default=0) >= 10:
                (task,) = [p for p in psutil.Process(running.pid).children(recursive=True) if "retrain.watch" in " ".join(p.cmdline())]
                os.kill(task.pid, signal.SIGKILL)
                killed_at = max(steps)
            time.sleep(0.05)
    told = log.read_text()
    assert running.returncode == 0 and "new_state=up_for_retry" in told, told
    (step,) = re.findall(r"retrain_k8: continuing after step (\d+)", told)
    assert killed_at <= int(step) < 30
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    assert str(client.get_model_version_by_alias("hypersd-smoke", "champion").version) == "1"
    runs = client.search_runs([client.get_experiment_by_name("hypersd").experiment_id])  # type: ignore[union-attr]
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1  # both tasks and the retry are one run


# --- systemd, cron, GitHub ---------------------------------------------------------------------------------------------------------------


def parsed(command: list[str]) -> dict[str, Any]:
    """The options of ``kedro run ...``, as the real command line takes them. Its environment and its pipeline exist."""
    from hypersd_pipeline.checks import check_environment, check_pipelines
    from hypersd_pipeline.cli import run

    assert Path(command[0]).name == "kedro" and command[1] == "run"
    bootstrap_project(ROOT)
    with run.make_context("run", command[2:]) as context:
        options = dict(context.params)
    check_environment(ROOT / "conf", options["env"])
    check_pipelines(options["pipelines"])
    return options


def cron_line() -> str:
    (line,) = re.findall(r"^0 2 \* \* 1 .*$", DOCS.read_text(), re.MULTILINE)
    return str(line)


def unit(name: str) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None, comment_prefixes="#")
    found.optionxform = str  # type: ignore[method-assign, assignment]
    found.read_string((DEPLOY / name).read_text())
    return found


def workflow_steps() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    workflow = yaml.load((DEPLOY / "github-retrain.yml").read_text(), yaml.BaseLoader)  # YAML 1.1 takes `on` for true
    (job,) = workflow["jobs"].values()
    return workflow, job["steps"]


def test_each_scheduler_runs_a_command_of_today():
    service = shlex.split(unit("hypersd-retrain.service")["Service"]["ExecStart"])
    (cron,) = re.findall(r"\S+/kedro run .*?(?= >>)", cron_line())
    (github,) = re.findall(r"\S+/kedro run .*?(?= \|\|)", workflow_steps()[1][-1]["run"])
    for command in (service, shlex.split(cron), shlex.split(github)):
        options = parsed(command)
        assert (options["env"], options["pipelines"]) == ("sdxl", ["retrain"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt-get install systemd")
def test_systemd_takes_the_units(tmp_path: Path):
    kedro = tmp_path / "hypersd-pipeline/.venv/bin/kedro"
    kedro.parent.mkdir(parents=True)
    (tmp_path / "run").mkdir()
    units = [str(DEPLOY / name) for name in ("hypersd-retrain.service", "hypersd-retrain.timer")]
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}

    def verified() -> tuple[int, str]:
        done = subprocess.run(["systemd-analyze", "verify", "--user", *units], env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert verified()[0] == 1  # there is no kedro yet
    shutil.copy(shutil.which("true") or "", kedro)
    assert verified() == (0, "")
    when = subprocess.run(
        ["systemd-analyze", "calendar", unit("hypersd-retrain.timer")["Timer"]["OnCalendar"]], capture_output=True, text=True
    )
    assert "Normalized form: Mon *-*-* 02:00:00" in when.stdout
    assert unit("hypersd-retrain.service")["Service"]["SuccessExitStatus"] == "10"


@pytest.fixture
def home(tmp_path: Path) -> Callable[[int], Path]:
    """A home in which ``kedro`` ends with the exit code, after it has said what it was asked."""

    def make(code: int) -> Path:
        kedro = tmp_path / "hypersd-pipeline/.venv/bin/kedro"
        kedro.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hypersd-pipeline/data/sdxl/08_reporting").mkdir(parents=True, exist_ok=True)
        (tmp_path / "hypersd-pipeline/data/sdxl/08_reporting/retrain_report.md").write_text("the report\n")
        kedro.write_text(f'#!/bin/sh\necho "asked: $*"\nexit {code}\n')
        kedro.chmod(0o755)
        return tmp_path

    return make


def test_the_line_of_cron_runs_in_the_little_that_cron_gives_it_and_never_twice_at_once(home: Callable[[int], Path]):
    line = cron_line()
    assert line.split()[:5] == ["0", "2", "*", "*", "1"] and "%" not in line  # cron makes new lines of them
    here = home(10)

    def cron() -> int:
        environment = {"HOME": str(here), "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh", "LOGNAME": "somebody"}
        return subprocess.run(["/bin/sh", "-c", line.split(maxsplit=5)[5]], env=environment, cwd=here).returncode

    log = here / "hypersd-pipeline/retrain.log"
    assert cron() == 10 and log.read_text() == "asked: run --env sdxl --pipelines retrain\n"
    with (here / "hypersd-pipeline/data/.retrain").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cron() == 1
    assert log.read_text().count("asked") == 1


@pytest.mark.parametrize(("code", "ends", "summary"), [(0, 0, "the report\n"), (10, 0, "the report\n"), (1, 1, ""), (137, 1, "")])
def test_the_step_of_github_fails_where_the_retraining_failed_and_only_there(home: Callable[[int], Path], code, ends, summary):
    workflow, steps = workflow_steps()
    here = home(code)
    (job,) = workflow["jobs"].values()
    assert workflow["on"] == {"schedule": [{"cron": "0 2 * * 1"}], "workflow_dispatch": ""} and job["runs-on"] == ["self-hosted", "gpu"]
    script = here / "step.sh"
    script.write_text(steps[-1]["run"])
    (here / "summary").touch()
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]  # GitHub's own, where a step says `shell: bash`
    environment = {"PATH": "/usr/bin:/bin", "GITHUB_STEP_SUMMARY": str(here / "summary")}
    done = subprocess.run(shell, env=environment, cwd=here / "hypersd-pipeline", capture_output=True, text=True)
    assert (done.returncode, (here / "summary").read_text()) == (ends, summary)
    assert done.stdout == "asked: run --env sdxl --pipelines retrain\n"
