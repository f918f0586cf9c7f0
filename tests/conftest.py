"""A small Kedro project with the real hooks, command line and datasets, whose stages take no time."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from servers import Server, environment_of

import hypersd_pipeline  # noqa: F401  # before anything imports torchvision

ROOT = Path(__file__).parents[1]

FILES = {
    "pyproject.toml": """
        [tool.kedro]
        package_name = "small"
        project_name = "small"
        kedro_init_version = "1.7.0"
        source_dir = "src"
        """,
    ".telemetry": "consent: false\n",
    "src/small/__init__.py": "",
    "src/small/settings.py": "from hypersd_pipeline.settings import *\n",
    "src/small/cli.py": "from hypersd_pipeline.cli import cli, run\n",
    "src/small/pipeline_registry.py": "from hypersd_pipeline.pipeline_registry import register_pipelines\n",
    "src/small/pipelines/__init__.py": "",
    "src/small/pipelines/data_prep/__init__.py": "from .pipeline import create_pipeline\n",
    "src/small/pipelines/data_prep/pipeline.py": """
        from kedro.pipeline import Node, Pipeline

        def make(size: int) -> dict:
            return {"size": size}

        def create_pipeline(**_):
            return Pipeline([Node(make, "params:size", "metrics_data", name="make")])
        """,
    "src/small/pipelines/full_distill/__init__.py": "from .pipeline import create_pipeline\n",
    "src/small/pipelines/full_distill/pipeline.py": """
        import os
        import time
        from kedro.pipeline import Node, Pipeline
        from pydantic import Field
        from hypersd_pipeline.config import Strict
        from hypersd_pipeline.errors import UserError

        class Stage(Strict):
            segments: int = Field(ge=1)
            steps: int = 3

        def train(data: dict, stage: Stage, stream) -> dict:
            here = str(stage.segments)
            for step in range(int(os.environ.get("START", 0)), stage.steps):
                stream({"train/loss": 1 / (step + 1), "bad": float("nan")}, step)
                time.sleep(float(os.environ.get("PAUSE", 0)))
                if os.environ.get("KILL") == here and step == int(os.environ.get("KILL_STEP", stage.steps - 1)):
                    os.kill(os.getpid(), int(os.environ["SIGNAL"]))
            if os.environ.get("FAIL") == here:
                raise UserError("row 7 of data.csv is empty; remove it.")
            return {"fid": {"4": 10.0 * stage.segments}, "clip": float("inf"), "note": "text", "interval": [1, 2]}

        def stage(k):
            node = Node(train, ["metrics_data", "params:stage", "metric_stream"], "metrics", name="train")
            return Pipeline([node], namespace=f"tscd_k{k}", inputs={"metrics_data"}, outputs={"metrics": f"metrics_k{k}"})

        def create_pipeline(**_):
            return stage(2) + stage(1)
        """,
    "conf/base/catalog.yml": """
        "metrics_{k}":
          type: hypersd_pipeline.io.MetricsDataset
          filepath: data/metrics_{k}.json
          metadata: {mlflow: artifact}
        "{stage}.metric_stream":
          type: hypersd_pipeline.io.MetricStreamDataset
          filepath: data/{stage}.csv
        """,
    "conf/base/parameters.yml": """
        size: 4
        tscd_k2: {stage: {segments: 2}}
        tscd_k1: {stage: {segments: 1}}
        """,
    "conf/wrong/parameters_tscd.yml": "tscd_k1: {stage: {stepz: 5}}\n",
    "data/metrics_data.json": '{"size": 4}',
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: with several processes none of them then waits for a long file that began last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs: making its tables takes ten seconds, copying it none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def small_project(tmp_path: Path, empty_database: Path) -> Path:
    """The folder of a fresh copy of the small project."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        indent = len(text) - len(text.lstrip("\n ")) - 1 if text.startswith("\n") else 0
        path.write_text("\n".join(line[indent:] for line in text.split("\n")))
    (tmp_path / "conf" / "local").mkdir()
    for name in ("conf/logging.yml", "conf/base/mlflow.yml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    shutil.copy(empty_database, tmp_path / "elsewhere.db")
    return tmp_path


@pytest.fixture
def kedro() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``kedro(folder, *arguments, **environment)`` runs the real command line in `folder`."""

    def call(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kedro", *arguments]
        return subprocess.run(command, cwd=folder, env=environment_of(**environment), capture_output=True, text=True)

    return call


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[Server]:
    """A server that is not started yet."""
    database = tmp_path / "server" / "mlflow.db"
    database.parent.mkdir()
    shutil.copy(empty_database, database)
    made = Server(database)
    yield made
    made.stop()
