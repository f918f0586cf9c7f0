"""What dvc.lock has recorded, beside what dvc.yaml and the files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dvc.repo import Repo


def paths(entries: list[Any]) -> set[str]:
    """Paths of outs, deps, metrics or plots, which may be plain or carry options."""
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def disagreements(recorded: dict[str, Any], stages: dict[str, dict[str, Any]]) -> list[str]:
    """What dvc.lock names and dvc.yaml does not, or the other way round: stages, commands, files, sections of parameters."""
    found = [f"stage {name}" for name in sorted(recorded.keys() ^ stages.keys())]
    for name in recorded.keys() & stages.keys():
        lock, stage = recorded[name], stages[name]
        outs = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
        named = {f"{name}: deps: {path}" for path in paths(stage["deps"])} | {f"{name}: outs: {path}" for path in paths(outs)}
        named |= {f"{name}: params: {file}: {key}" for entry in stage["params"] for file, keys in entry.items() for key in keys}
        known = {f"{name}: {kind}: {entry['path']}" for kind in ("deps", "outs") for entry in lock.get(kind, [])}
        known |= {f"{name}: params: {file}: {key}" for file, values in lock.get("params", {}).items() for key in values}
        found += sorted(named ^ known) + [f"{name}: cmd"] * (lock["cmd"] != stage["cmd"])
    return found


def changed(root: Path, path: str) -> bool:
    """Whether an output of a stage is another one than dvc.lock has recorded, as DVC sees it."""
    with Repo(str(root)) as repo:
        (out,) = (out for out in repo.index.outs if Path(out.fs_path) == root / path)
        return out.status() != {}
