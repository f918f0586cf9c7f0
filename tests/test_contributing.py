"""What CONTRIBUTING.md says can be followed to the letter: its blocks are run here, and the files that it names exist."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.evaluation.results import long_table
from hypersd_pipeline.experiments.cells import AblationConfig, plan
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS
from hypersd_pipeline.training.config import StageConfig

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def block(title: str) -> str:
    """The code under the comment that begins with ``title``."""
    return re.search(rf"<!-- {re.escape(title)}.*?-->\n```\w+\n(.*?)```", TEXT, re.DOTALL)[1]


def parameters(tmp_path: Path, text: str) -> dict[str, Any]:
    """The project's own parameters with a file of one's own in an environment."""
    shutil.copytree(ROOT / "conf" / "base", tmp_path / "conf" / "base")
    (tmp_path / "conf" / "mine").mkdir()
    (tmp_path / "conf" / "mine" / "parameters.yml").write_text(text)
    return ProjectConfigLoader(tmp_path / "conf", env="mine", **CONFIG_LOADER_ARGS)["parameters"]


def test_a_method_is_one_block(tmp_path):
    found = parameters(tmp_path, block("method"))
    stage, tscd = (StageConfig.model_validate(found[key]["stage"]) for key in ("baseline_huber", "tscd_k1"))
    assert stage.consistency is not None and tscd.consistency is not None
    assert (stage.consistency.segments, stage.consistency.distance) == (1, "huber")
    assert stage.consistency.model_copy(update={"distance": "mse"}) == tscd.consistency  # nothing else differs
    assert stage.lora == tscd.lora

    ablation = AblationConfig.model_validate({**found["ablation"], "only": ["Huber"]})
    (cell,) = plan(ablation)
    assert cell.stages["k1"].terms == stage.terms and cell.stages["k1"].loop.steps > 1


@pytest.mark.parametrize(("wrong", "told"), [("distance: hubert", "distance"), ("distence: huber", "distence")])
def test_a_misspelt_method_is_refused(tmp_path, wrong, told):
    found = parameters(tmp_path, block("method").replace("distance: huber", wrong))
    with pytest.raises(ValueError, match=told):
        StageConfig.model_validate(found["baseline_huber"]["stage"])


def test_a_metric_is_a_function_and_a_line():
    names: dict[str, Any] = {}
    exec(block("metric"), names)
    x, y = torch.randn(7, 5), torch.randn(6, 5) + 1

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() @ b.double() / 5 + 1) ** 3)

    within = [sum(k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1)) for s in (x, y)]
    across = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    value = names["kernel_distance"](x, y)
    assert value == pytest.approx(sum(within) - 2 * across)

    line = re.search(r'metrics\[f"\{prefix\}(\w+)_\{kind\}/\{row\}"\] = kernel_distance\(scores.features, other\)', TEXT)
    name = f"{line[1]}_recon/4_steps"
    (found,) = long_table({"k4": {name: value, f"{name}_low": 0.0, f"{name}_high": 2.0, "samples": 7}}).itertuples()
    assert (found.metric, found.row) == ("kernel_distance_recon", "4_steps")


def test_an_objective_is_a_file_and_two_lines(tmp_path):
    """The term of the example is put into a copy of the package as the text says, and a configuration names it."""
    package = tmp_path / "src" / "hypersd_pipeline"
    shutil.copytree(ROOT / "src" / "hypersd_pipeline", package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (package / "assets").symlink_to(ROOT / "src" / "hypersd_pipeline" / "assets")
    (package / "training" / "terms" / "two_jumps.py").write_text(term_of_the_example())
    terms = package / "training" / "terms" / "__init__.py"
    old, union = terms.read_text(), block("the union")
    assert union.count("|") == old[old.index("AnyTerm = ") :].split("Field(")[0].count("|") + 1, "the union has changed: correct it"
    line = re.search(r"^from hypersd_pipeline\.training\.terms\.two_jumps import .*$", TEXT, re.MULTILINE)[0]
    new = re.sub(r"^AnyTerm = Annotated\[.*?^\]\n", union, old, flags=re.DOTALL | re.MULTILINE)
    terms.write_text(new.replace("\n__all__", f"{line}\n\n__all__", 1))

    conf = tmp_path / "conf"
    shutil.copytree(ROOT / "conf" / "base", conf / "base")
    (conf / "mine").mkdir()
    (conf / "mine" / "parameters.yml").write_text(block("objective"))
    code = f"""
from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS
from hypersd_pipeline.training.config import StageConfig, changed
from hypersd_pipeline.training.cost import ideal_forwards

found = ProjectConfigLoader({str(conf)!r}, env="mine", **CONFIG_LOADER_ARGS)["parameters"]["own"]["stage"]
stage = StageConfig.model_validate(found)
assert list(stage.active()) == ["consistency", "adversarial", "two_jumps"], stage.active()
assert stage.identity()["terms"]["two_jumps"] == {{"weight": 0.5, "kind": "two_jumps", "guidance": 3.0}}
assert stage.place_of(stage.terms["two_jumps"]) == "trajectory"
without = changed(stage, terms={{"two_jumps": None}})
assert ideal_forwards(stage, 0.4) == ideal_forwards(without, 0.4) + 4
try:
    changed(stage, terms={{"consistency": None, "adversarial": None}})
except ValueError as error:
    assert "the consistency term" in str(error)
else:
    raise AssertionError("a term on the trajectory needs a consistency term")
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def term_of_the_example() -> str:
    """The two classes of ``examples/own_objective.py`` with the imports that they need."""
    text = (ROOT / "examples" / "own_objective.py").read_text()
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    assert [node.name for node in classes] == ["TwoJumpsConfig", "TwoJumps"]
    code = "\n\n\n".join(ast.get_source_segment(text, node) or "" for node in classes)
    return f"""from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.training.terms.base import Context, Cost, Place, Scalars, TermConfig, View


{code}
"""


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:src|tests|conf|docs|examples)/[\w./-]+\.\w+)`", TEXT))))
def test_named_files_exist(path):
    assert (ROOT / path).exists()


def test_the_house_map_names_every_room():
    rooms = {path.name for path in (ROOT / "src" / "hypersd_pipeline").iterdir() if path.is_dir()} - {"assets", "__pycache__"}
    table = TEXT[TEXT.index("## House map") :].split("\n## ")[0].split("| I want")[0]
    assert rooms <= set(re.findall(r"`(\w+)`", table))
