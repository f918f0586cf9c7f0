"""How much memory there is for a process: of a GPU, or of the machine as far as its control group lets it be used."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_GROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device | None = None, groups: Path = _GROUPS) -> float:
    """Bytes that are free now: of a CUDA device, or else of the machine's memory.

    Args:
        groups: where Linux shows control groups. A limit there counts, as containers and Slurm set it.
    """
    if device is not None and device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(float(psutil.virtual_memory().available), _left_in_group(groups))


def _left_in_group(groups: Path) -> float:
    """Of the process's own control group and those above it, the least that is left. Version 2, and 1 where it is mounted so."""
    left = [float("inf")]
    for line in _lines(Path("/proc/self/cgroup")):
        _, kinds, name = line.split(":", 2)
        if kinds == "":
            root, limit, used = groups, "memory.max", "memory.current"
        elif "memory" in kinds.split(","):
            root, limit, used = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / name.strip("/")
        for folder in (own, *own.parents):
            if folder != root and root not in folder.parents:
                break
            most, taken = _number(folder / limit), _number(folder / used)
            if most is not None and taken is not None:
                left.append(most - taken + (_cached(folder) or 0.0))
    return min(left)


def _cached(folder: Path) -> float | None:
    """Pages of files, which are given back where memory is short."""
    kept = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
    value = kept.get("inactive_file", kept.get("total_inactive_file"))
    return None if value is None else float(value)


def _number(path: Path) -> float | None:
    lines = _lines(path)
    return float(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
