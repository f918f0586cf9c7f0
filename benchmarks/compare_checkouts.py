"""Whether two checkouts train the same models: the content hash of every LoRA and UNet that a run has left in each.

    python benchmarks/compare_checkouts.py BEFORE AFTER --env smoke --run

A hash covers the names, types, shapes and bytes of all tensors of a file, and nothing of its metadata, so that a renamed key of a model
card is no difference. With ``--run`` both checkouts run the main job first, one after the other.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

SKIPPED = ("checkpoints", "pairs", "latents", "evaluation_reference")


def content_hash(file: Path) -> str:
    """sha256 over all tensors of a safetensors file, by name. The first 16 digits."""
    digest = hashlib.sha256()
    with safe_open(file, "pt") as content:
        for name in sorted(content.keys()):
            tensor = content.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()[:16]


def models_of(data: Path) -> dict[str, str]:
    """Content hash of every LoRA and UNet below a data folder, by path inside ``06_models``."""
    root = data / "06_models"
    files = [f for f in sorted(root.rglob("*.safetensors")) if not set(f.relative_to(root).parts) & set(SKIPPED)]
    return {f.relative_to(root).as_posix(): content_hash(f) for f in files}


def data_folder(checkout: Path, env: str | None) -> Path:
    """Where a checkout's run writes: a folder of the environment's own, or ``data`` itself (checkouts of 0.1 have nothing else)."""
    own = checkout / "data" / (env or "")
    return own if (own / "06_models").is_dir() else checkout / "data"


def run(checkout: Path, env: str | None) -> None:
    """Run the main job with the checkout's own sources."""
    command = [sys.executable, "-m", "kedro", "run", *(["--env", env] if env else []), "--pipeline", "full_distill"]
    subprocess.run(command, cwd=checkout, check=True, env={**os.environ, "PYTHONPATH": str(checkout / "src")})


def main() -> int:
    """Print a row a model; 1 where a hash differs or a model is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--env", help="environment of the run; the default one if left out")
    parser.add_argument("--run", action="store_true", help="run the main job in both checkouts first")
    args = parser.parse_args()
    found = []
    for checkout in (args.before.resolve(), args.after.resolve()):
        if args.run:
            run(checkout, args.env)
        found.append(models_of(data_folder(checkout, args.env)))
    before, after = found
    if not before and not after:
        sys.exit("Error: neither checkout has a model below data/06_models; add --run, or run the main job first.")
    names = sorted({*before, *after})
    for name in names:
        one, other = before.get(name, "missing"), after.get(name, "missing")
        print(f"{'same   ' if one == other else 'DIFFERS'} {one} {other} {name}")
    return int(any(before.get(name) != after.get(name) for name in names))


if __name__ == "__main__":
    sys.exit(main())
