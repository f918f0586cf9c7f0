"""DVC's stages for any environment: dvc.yaml, which follows conf/base, rewritten for another one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import write_text
from hypersd_pipeline.sections import LIKE

_HEAD = """\
# Stages of the environment '{env}', made from dvc.yaml by `kedro repro --env {env}`. Each call of it makes this file again.
# It names the sections that {files} set, so that a changed value repeats the stages that read it.
# Commit this file and dvc.lock beside it.
"""
_ROOT = "../.."
"""The project, from the folder of an environment."""


def stages_file(root: Path, env: str | None) -> Path:
    """The file of an environment's stages: dvc.yaml of the project for base, of the environment's folder for another one."""
    return root / "dvc.yaml" if env in (None, "base", "local") else root / "conf" / str(env) / "dvc.yaml"


def stages_of(root: Path, loader: ProjectConfigLoader) -> dict[str, Any]:
    """The content of the environment's dvc.yaml.

    A stage runs with the environment, in a data folder of its own. Besides the files of conf/base its parameters are the same sections in
    the files of the environment and of those that it extends, and the sections that these are ``like``.
    """
    content = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    written = [(str(path.relative_to(root)), values) for path, values in loader.parameter_files]
    for stage in content["stages"].values():
        stage["wdir"] = _ROOT
        stage["cmd"] = stage["cmd"].replace("--env base", f"--env {loader.env}")
        stage["params"] = list(_parameters(stage["params"], written))
        for kind in ("deps", "outs", "metrics", "plots"):
            if kind in stage:
                stage[kind] = [_moved(entry, loader.data_folder()) for entry in stage[kind]]
        if "metrics" in stage:  # git keeps those of base. An environment's data folder is none of git's, so DVC does
            stage["metrics"] = [path for entry in stage["metrics"] for path in ([entry] if isinstance(entry, str) else entry)]
    # top-level plots are relative to the file, stages to their wdir
    content["plots"] = _moved(content.get("plots", []), f"{_ROOT}/{loader.data_folder()}")
    return content


def write_stages(root: Path, loader: ProjectConfigLoader) -> Path:
    """Write the environment's dvc.yaml if it is out of date. Nothing is written for base.

    Returns:
        The file.

    Raises:
        UserError: there is no dvc.yaml.
    """
    if not (root / "dvc.yaml").is_file():
        raise UserError(f"{root}: there is no dvc.yaml, so call this in a checkout of the project.")
    path = stages_file(root, loader.env)
    if path.parent != root:
        files = " and ".join(f"conf/{name}" for name in loader.environments[1:])
        body = yaml.safe_dump(stages_of(root, loader), sort_keys=False, width=140)
        text = _HEAD.format(env=loader.env, files=files) + body
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    return path


def repro(root: Path, loader: ProjectConfigLoader, arguments: Iterable[str]) -> int:
    """``dvc repro`` with the stages of an environment, and its exit code.

    Args:
        root: the project.
        loader: of the environment.
        arguments: names of stages, and options of ``dvc repro``.

    Raises:
        UserError: dvc is not installed beside this Python, or there is no dvc.yaml.
    """
    scripts = str(Path(sys.executable).parent)
    search = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    dvc = shutil.which("dvc", path=search)
    if dvc is None:
        raise UserError("dvc is not installed, so install it: pip install -c constraints.txt -e '.[pipeline]'.")
    file = write_stages(root, loader).relative_to(root)
    stages = yaml.safe_load((root / file).read_text(encoding="utf-8"))["stages"]
    given = list(arguments)
    options = [argument for argument in given if argument not in stages]
    targets = [f"{file}:{argument}" for argument in given if argument in stages] or [str(file)]
    # stages call `kedro` of the same installation, whether or not it is on the PATH
    return subprocess.run([dvc, "repro", *options, *targets], cwd=root, env={**os.environ, "PATH": search}).returncode


def _parameters(entries: list[dict[str, list[str]]], written: list[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, list[str]]]:
    """A stage's parameters: those of conf/base, and where other files set the same sections or what those are like."""
    wanted = {key for entry in entries for keys in entry.values() for key in keys}
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        new = {like.split(".")[0] for _, values in written for like in _likes(values.get(name))} - wanted
        wanted |= new
        waiting += new
    found = {file: [key for key in values if key in wanted] for file, values in written}
    yield from ({file: found[file]} for file in sorted(found) if found[file])


def _likes(value: Any) -> Iterator[str]:
    """The sections that `value` is like, at any depth."""
    if isinstance(value, Mapping):
        if isinstance(value.get(LIKE), str):
            yield value[LIKE]
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from _likes(item)


def _moved(value: Any, data: str) -> Any:
    """`value` with each path below ``data/`` below the environment's folder instead."""
    if isinstance(value, Mapping):
        return {_moved(key, data): _moved(item, data) for key, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, data) for item in value]
    return f"{data}/{value.removeprefix('data/')}" if isinstance(value, str) and value.startswith("data/") else value
