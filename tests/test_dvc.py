"""dvc.yaml says the same as the Kedro pipelines and their catalog."""

from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from kedro.framework.cli.project import run as kedro_run
from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from kedro.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def paths(entries: list[Any]) -> set[str]:
    """Paths of outs, deps, metrics or plots, which may be plain or carry options."""
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def nodes_of(command: str) -> Pipeline:
    """The nodes that a stage's command runs, parsed by Kedro's own command line."""
    with click.Context(kedro_run) as context:
        kedro_run.parse_args(context, command.split()[2:])
        options = context.params
    found = sum((pipelines[name] for name in options["pipelines"]), Pipeline([]))
    chosen = {"node_names": options["node_names"], "from_nodes": options["from_nodes"], "node_namespaces": options["namespaces"]}
    return found.filter(**{name: value or None for name, value in chosen.items()})


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """Dataset to path below the root, for datasets with a file."""
    bootstrap_project(ROOT)
    pipelines.set_requested(None)
    with KedroSession.create(project_path=ROOT, env="base", save_on_close=False) as session:
        catalog = session.load_context().catalog
    datasets = {
        name: catalog.get(name) for pipeline in pipelines.values() for name in pipeline.datasets() if not name.startswith("params:")
    }
    paths = {name: getattr(dataset, "_filepath", None) or getattr(dataset, "_path", None) for name, dataset in datasets.items()}
    return {name: str(Path(ROOT, path).relative_to(ROOT)) for name, path in paths.items() if path}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_what_its_nodes_read_and_write(stage, files):
    content, nodes = STAGES[stage], nodes_of(STAGES[stage]["cmd"])
    written = {files[name] for name in nodes.all_outputs() if name in files or name in nodes.outputs()}  # but what only passes between them
    assert paths(content["outs"] + content.get("metrics", []) + content.get("plots", [])) == written
    # A stage's curve and checkpoints are handles on files that outlive it.
    read = {files[name] for name in nodes.inputs() if name in files and not name.endswith((".metric_stream", ".checkpoints"))}
    declared = {path for path in paths(content["deps"]) if path.startswith("data/")}
    assert read <= declared
    # the pictures that the manifest points to, and the manifest that the latents are checked against
    assert declared - read <= {"data/03_primary/dataset", "data/03_primary/manifest"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_tracks_every_parameter_of_its_nodes(stage, files):
    tracked = {key for entry in STAGES[stage]["params"] for keys in entry.values() for key in keys}
    used = {name.removeprefix("params:").split(".")[0] for name in nodes_of(STAGES[stage]["cmd"]).inputs() if name.startswith("params:")}
    assert used == tracked
    for entry in STAGES[stage]["params"]:
        for file, keys in entry.items():
            assert set(keys) <= set(yaml.safe_load((ROOT / file).read_text()))


def test_every_code_dependency_exists():
    code = {path for content in STAGES.values() for path in paths(content["deps"]) if path.startswith("src/")}
    assert [path for path in code if not (ROOT / path).exists()] == []


def test_the_stages_cover_the_main_job(files):
    main = {node.name for node in pipelines["full_distill"].nodes}
    assert {node.name for content in STAGES.values() for node in nodes_of(content["cmd"]).nodes} == main
