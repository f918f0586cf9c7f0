"""dvc.yaml says the same as the Kedro pipelines, their catalog, the parameters and the source code."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from imports import MODULES, closure, imports_of, tree_of
from kedro.framework.cli.project import run as kedro_run
from kedro.framework.project import pipelines
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from kedro.pipeline import Pipeline
from recorded import changed, disagreements, paths

from hypersd_pipeline.evaluation.results import MODELS

ROOT = Path(__file__).parents[1]
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMETERS: dict[str, Path] = {
    key: path for path in (ROOT / "conf" / "base").glob("parameters*.yml") for key in yaml.safe_load(path.read_text())
}
"""Section of the parameters -> the file that it stands in."""
WIRING = "hypersd_pipeline.pipelines"


def options_of(command: str) -> dict[str, Any]:
    """A stage's command, parsed by Kedro's own command line."""
    with click.Context(kedro_run) as context:
        kedro_run.parse_args(context, command.split()[2:])
        return context.params


def nodes_of(command: str) -> Pipeline:
    """The nodes that a stage's command runs."""
    options = options_of(command)
    found = sum((pipelines[name] for name in options["pipelines"]), Pipeline([]))
    chosen = {"node_names": options["node_names"], "from_nodes": options["from_nodes"], "node_namespaces": options["namespaces"]}
    return found.filter(**{name: value or None for name, value in chosen.items()})


@pytest.fixture(scope="module")
def datasets() -> dict[str, Any]:
    """Every dataset of every pipeline."""
    bootstrap_project(ROOT)
    pipelines.set_requested(None)
    with KedroSession.create(project_path=ROOT, env="base", save_on_close=False) as session:
        catalog = session.load_context().catalog
    names = {name for pipeline in pipelines.values() for name in pipeline.datasets() if not name.startswith("params:")}
    return {name: catalog.get(name) for name in names}


@pytest.fixture(scope="module")
def files(datasets: dict[str, Any]) -> dict[str, str]:
    """Dataset to path below the root, for datasets with a file."""
    found = {name: getattr(dataset, "_filepath", None) or getattr(dataset, "_path", None) for name, dataset in datasets.items()}
    return {name: str(Path(ROOT, path).relative_to(ROOT)) for name, path in found.items() if path}


# --- files -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_what_its_nodes_read_and_write(stage, files):
    content, nodes = STAGES[stage], nodes_of(STAGES[stage]["cmd"])
    written = {files[name] for name in nodes.all_outputs() if name in files or name in nodes.outputs()}  # but what only passes between them
    written |= {files[name] for name in nodes.inputs() if name.endswith(".metric_stream")}  # a stage's curve grows while it trains
    assert paths(content["outs"] + content.get("metrics", []) + content.get("plots", [])) == written
    # checkpoints are a handle on files that outlive the stage
    read = {files[name] for name in nodes.inputs() if name in files and not name.endswith((".metric_stream", ".checkpoints"))}
    declared = {path for path in paths(content["deps"]) if path.startswith("data/")}
    assert read <= declared
    # the images that the manifest points to, and the manifest that the latents are checked against
    assert declared - read <= {"data/03_primary/dataset", "data/03_primary/manifest"}


def test_the_stages_cover_the_main_job(files):
    main = {node.name for node in pipelines["full_distill"].nodes}
    assert {node.name for content in STAGES.values() for node in nodes_of(content["cmd"]).nodes} == main


# --- parameters --------------------------------------------------------------------------------------------------------------------------


def likes(value: Any) -> Iterator[str]:
    """The sections that a value of a parameters file is ``like``, at any depth."""
    if isinstance(value, dict):
        yield from (str(value["like"]).split(".")[0] for _ in range("like" in value))
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from likes(item)


def with_likes(sections: Iterable[str]) -> set[str]:
    """The sections, those that they are ``like``, and so on."""
    found: set[str] = set()
    waiting = list(sections)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += likes(yaml.safe_load(PARAMETERS[name].read_text())[name])
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_tracks_every_parameter_of_its_nodes(stage, files):
    """DVC compares what is written in the files, so a stage has to name the sections that its own section is like too."""
    tracked = {key: Path(ROOT, file) for entry in STAGES[stage]["params"] for file, keys in entry.items() for key in keys}
    used = {name.removeprefix("params:").split(".")[0] for name in nodes_of(STAGES[stage]["cmd"]).inputs() if name.startswith("params:")}
    assert tracked == {name: PARAMETERS[name] for name in with_likes(used)}


def test_sections_are_followed_to_those_that_they_are_like():
    assert with_likes(["tscd_k8"]) == {"tscd_k8", "tscd"}
    assert with_likes(["one_step_unet"]) == {"one_step_unet", "dmd", "tscd_k1", "tscd"}
    assert with_likes(["feedback"]) == {"feedback", "tscd"}


# --- code --------------------------------------------------------------------------------------------------------------------------------
#
# What a stage computes with, and so depends on:
# - the modules of its node functions and all that these import, in functions too;
# - of an adapter in pipelines/, which hands the catalog's values to a recipe, only what the adapter itself names: its neighbours belong to
#   other stages;
# - the file of its pipeline and what that shares with others. Their imports are not followed, since they wire every stage;
# - the classes that write its outs: they decide the bytes. As files too: what they send to MLflow changes no result.
#
# Not included: hooks, checks, cli and settings decide what is recorded and refused, not what is computed. The configuration loader decides
# how parameters are put together. The values themselves are tracked, and a better error message is no reason to train again. Of the classes
# that read inputs, what they hand over is a class of a room below, which the nodes import themselves.


def named_by(module: str, function: str) -> set[str]:
    """The modules of ours that a function names in its signature and its body, or a function beside it that it calls."""
    functions = {node.name: node for node in tree_of(module).body if isinstance(node, ast.FunctionDef)}
    names: set[str] = set()
    waiting = [function]
    while waiting:
        used = {node.id for node in ast.walk(functions[waiting.pop()]) if isinstance(node, ast.Name)}
        waiting += used & functions.keys() - names
        names |= used
    return {item.module for item in imports_of(module) if item.module in MODULES and names & set(item.names)}


def needed_code(command: str, datasets: dict[str, Any]) -> set[str]:
    """The files, below the root, that a stage has to depend on."""
    nodes = nodes_of(command)
    starts: set[str] = set()
    modules: set[str] = set()
    for node in nodes.nodes:
        module = node.func.__module__
        modules.add(module)
        starts |= named_by(module, node.func.__name__) if module.startswith(WIRING) else {module}
    for name in options_of(command)["pipelines"]:
        wiring = f"{WIRING}.{name}.pipeline"
        modules |= {wiring, *(item.module for item in imports_of(wiring) if item.module.startswith(WIRING))}
    for name in nodes.all_outputs() & datasets.keys():
        kind = getattr(datasets[name], "_dataset_type", type(datasets[name]))  # of the files in a folder of them
        modules |= {kind.__module__} & MODULES.keys()
    modules |= closure(starts)
    code = {str(MODULES[module].relative_to(ROOT)) for module in modules if has_code(module)}
    return code | ({"src/hypersd_pipeline/assets"} if any(map(names_assets, modules)) else set())


def has_code(module: str) -> bool:
    """Whether a file has more than a docstring."""
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in tree_of(module).body)


def names_assets(module: str) -> bool:
    """Whether a module knows where the packaged weights lie."""
    strings = (node.value for node in ast.walk(tree_of(module)) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return any(text == "assets" or text.startswith("src/hypersd_pipeline/assets") for text in strings)


def covers(dependency: str, file: str) -> bool:
    """Whether a dependency is the file, or a folder that it lies in."""
    return file == dependency or file.startswith(f"{dependency}/")


def code_of(stage: str) -> list[str]:
    """The dependencies of a stage on source code."""
    return sorted(path for path in paths(STAGES[stage]["deps"]) if not path.startswith("data/"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_the_code_that_it_runs(stage, datasets):
    dependencies = code_of(stage)
    missing = {file for file in needed_code(STAGES[stage]["cmd"], datasets) if not any(covers(known, file) for known in dependencies)}
    assert not missing, f"{stage} lacks in deps:\n" + "\n".join(f"      - {file}" for file in sorted(missing))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_no_code_that_it_does_not_run(stage, datasets):
    needed = needed_code(STAGES[stage]["cmd"], datasets)
    assert [known for known in code_of(stage) if not any(covers(known, file) for file in needed)] == []


@pytest.mark.parametrize(
    ("stage", "depends", "does_not"),
    [
        ("measure_feedback", ["objectives/feedback.py", "evaluation/probe.py", "metrics/mask_ap.py"], ["recipes/distil.py"]),
        ("feedback", ["evaluation/probe.py", "training/guard.py", "perception/solo.py"], ["evaluation/bench.py", "recipes/one_step.py"]),
        (
            "tscd_k8",
            ["training/terms/consistency.py", "models/folded.py", "recipes/distil.py"],
            ["evaluation/bench.py", "metrics/frechet.py"],
        ),
        ("one_step_unet", ["training/critic.py", "data/trajectories.py"], ["evaluation/bench.py", "recipes/distil.py"]),
        ("evaluate_k8", ["evaluation/bench.py", "models/contract.py"], ["objectives/consistency.py", "training/stage.py"]),
        ("reference", ["evaluation/reference.py", "models/teacher.py", "rewards/base.py"], ["training/stage.py", "perception/solo.py"]),
    ],
)
def test_the_code_of_a_stage_is_followed(stage, depends, does_not, datasets):
    """Of a few stages, what a person would expect: an evaluation does not depend on how the LoRA was trained, and the other way round."""
    needed = {file.removeprefix("src/hypersd_pipeline/") for file in needed_code(STAGES[stage]["cmd"], datasets)}
    assert set(depends) <= needed
    assert not set(does_not) & needed


def test_every_code_dependency_exists():
    code = {path for content in STAGES.values() for path in paths(content["deps"]) if path.startswith("src/")}
    assert [path for path in code if not (ROOT / path).exists()] == []


# --- the record of the default's results -------------------------------------------------------------------------------------------------


def record_of(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What DVC would write into dvc.lock, without the hashes."""
    return {
        name: {
            "cmd": stage["cmd"],
            "deps": [{"path": path} for path in paths(stage["deps"])],
            "params": {file: dict.fromkeys(keys) for entry in stage["params"] for file, keys in entry.items()},
            "outs": [{"path": path} for kind in ("outs", "metrics", "plots") for path in paths(stage.get(kind, []))],
        }
        for name, stage in stages.items()
    }


def test_what_a_record_lacks_is_named():
    record = record_of(STAGES)
    assert disagreements(record, STAGES) == []
    record["tscd_k8"]["deps"].remove({"path": "src/hypersd_pipeline/draws.py"})
    record["tscd_k4"]["outs"].append({"path": "data/08_reporting/old.json"})
    record["tscd_k2"]["params"]["conf/base/parameters_tscd.yml"].pop("tscd")
    record["evaluation"]["cmd"] = "true"
    record["older"] = record.pop("dmd")
    assert sorted(disagreements(record, STAGES)) == [
        "evaluation: cmd",
        "stage dmd",
        "stage older",
        "tscd_k2: params: conf/base/parameters_tscd.yml: tscd",
        "tscd_k4: outs: data/08_reporting/old.json",
        "tscd_k8: deps: src/hypersd_pipeline/draws.py",
    ]


def test_git_has_a_record_of_these_stages_and_its_table():
    """A lock that belongs to other stages, or to another table of metrics, was forgotten in a commit: see CONTRIBUTING.md."""
    table = "data/08_reporting/table"
    ignored = subprocess.run(["git", "check-ignore", "dvc.lock", f"{table}/k8_8.json"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.returncode == 1 and not ignored.stdout
    tracked = subprocess.run(["git", "ls-files", "dvc.lock", table], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert ("dvc.lock" in tracked) == any(path.startswith(table) for path in tracked), "commit dvc.lock and the table together"
    if "dvc.lock" not in tracked:
        return  # not recorded yet
    recorded = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    assert disagreements(recorded, STAGES) == [], "run `kedro repro`, and commit dvc.lock and the table"
    assert {path.removeprefix(f"{table}/") for path in tracked} >= {f"{model}_{n}.json" for model, steps in MODELS.items() for n in steps}
    assert not changed(ROOT, table), "dvc.lock was made with other metrics than the table has"
