"""Imports go down: rooms know the rooms below them, modules do not go round in circles, and few places know Kedro and MLflow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from imports import MODULES, Import, closure, imports_of, packages_above

ROOT = Path(__file__).parents[1]

# From the ground floor up. A room imports from itself and from what stands before it. docs/architecture.md has the same order.
ORDER = (
    "errors", "masking", "logs", "compat", "config", "files", "verdicts", "conditioning", "draws",
    "diffusion", "objectives", "models", "export", "data", "rewards", "perception", "metrics",
    "training", "evaluation", "comparison", "recipes", "experiments", "arena", "retraining", "io", "pipelines",
    "config_faults", "order", "sections", "config_loader", "options", "checks", "dvc_stages", "cluster", "hooks", "settings", "cli",
    "pipeline_registry", "__main__",
)  # fmt: skip
KEDRO = {"io", "pipelines", "order", "config_loader", "options", "checks", "hooks", "settings", "cli", "pipeline_registry", "__main__"}
MLFLOW = {"io", "hooks"}
PACKAGE = "hypersd_pipeline"
KINDS = ("top", "function", "typing")
"""Where an import stands: run with the module, inside a function, or for type checkers only."""


def room(module: str) -> str:
    """The folder, or the module on the ground floor, that a module of ours is in. The package itself has none."""
    return module.split(".")[1] if "." in module else ""


def ours(module: str) -> list[Import]:
    """What a module imports of ours."""
    return [found for found in imports_of(module) if found.module in MODULES]


def told(found: list[tuple[str, Import]]) -> str:
    return "\n" + "\n".join(f"{module}:{item.line} imports {item.module}" for module, item in found)


def test_every_room_has_its_place_in_the_order():
    assert {room(module) for module in MODULES} - {"", "assets"} == set(ORDER)


@pytest.mark.parametrize("kind", KINDS)
def test_imports_go_down(kind):
    def goes_up(module: str, target: str) -> bool:
        return room(module) != room(target) and ORDER.index(room(target)) > ORDER.index(room(module))

    wrong = [(m, i) for m in MODULES if room(m) in ORDER for i in ours(m) if i.kind == kind and room(i.module) and goes_up(m, i.module)]
    assert not wrong, told(wrong)


def test_the_package_itself_imports_the_ground_floor_only():
    assert {room(found.module) for found in ours(PACKAGE)} <= {"errors", "compat"}


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions and for type checkers count. Importing a module imports the packages above it too."""
    below = {module: {found.module for found in ours(module)} - {module} for module in MODULES}
    for module, targets in below.items():
        targets |= {above for target in targets for above in packages_above(target)} - set(packages_above(module)) - {module}
    while leaves := [module for module, targets in below.items() if not targets & below.keys()]:
        for module in leaves:
            del below[module]
    assert not below, f"in a circle, or above one: {sorted(below)}"


def test_a_pipeline_imports_no_other_pipeline():
    """`full_distill` is made of the others. What several share is beside them in ``pipelines/nodes.py``."""
    folders = {path.name for path in (ROOT / "src" / PACKAGE / "pipelines").iterdir() if (path / "pipeline.py").is_file()}
    for module in MODULES:
        own, *_ = [*module.split(".")[2:], ""]
        if room(module) == "pipelines" and own != "full_distill":
            named = {
                found.module.split(".")[2] for found in ours(module) if found.module.count(".") > 1 and room(found.module) == "pipelines"
            }
            assert named & folders <= {own}, module


@pytest.mark.parametrize(("libraries", "allowed"), [(("kedro", "kedro_datasets", "kedro_mlflow"), KEDRO), (("mlflow",), MLFLOW)])
def test_few_rooms_know_the_framework(libraries, allowed):
    wrong = [(m, i) for m in MODULES if room(m) not in allowed for i in imports_of(m) if i.module.split(".")[0] in libraries]
    assert not wrong, told(wrong)


def test_rooms_below_the_data_sets_reach_no_kedro_at_all():
    """Not through another room either: a researcher's script can use everything up to `experiments`."""
    below = [module for module in MODULES if room(module) in ORDER[: ORDER.index("io")]]
    assert not [module for module in closure(below) if room(module) in KEDRO]


def test_the_documentation_has_the_same_order():
    table = (ROOT / "docs" / "architecture.md").read_text().split("\n## ")[1]
    named = [name for line in table.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)[./`]", line.split("|")[1])]
    assert named == list(ORDER)
