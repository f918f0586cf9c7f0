"""Memory and time of a million rows of tar shards: their validation, the manifest, the plan of a cache and its captions.

    python benchmarks/data_rows.py --rows 1000000

The shards are hard links to one tar of tiny images, so they take little of the disk. Each step runs in a process of its own.
Its peak memory is what the system reports, without what the same process has after its imports. The step ``plan`` decides what has to be
encoded. Then it writes files of a cache with the keys of all rows and hardly any tensors, and ``again`` decides what they leave to encode.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

PER_SHARD = 10_000  # as img2dataset's
STEPS = ("validate", "manifest", "select", "plan", "again", "captions")


def make_shards(folder: Path, rows: int) -> None:
    """``rows`` training samples in hard links to one tar, and a small tar of test samples."""
    folder.mkdir()
    for name, count, seed in (("first", min(rows, PER_SHARD), 0), ("test", 8, 1)):
        rng = np.random.default_rng(seed)
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in range(count):
                buffer = BytesIO()
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
                meta = {"caption": f"a photograph of the thing with number {i} on a table, seen from above", "aesthetic": i % 10}
                for suffix, content in (("png", buffer.getvalue()), ("json", json.dumps(meta).encode())):
                    info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
    for shard in range(-(-rows // PER_SHARD)):
        os.link(folder / "first.tar", folder / f"{shard:05d}.tar")


def step(name: str, folder: Path, rows: int) -> dict[str, float]:
    """Run one step in this process."""
    import torch

    from hypersd_pipeline.data.cache import CAPTIONS, read_captions, write_shard
    from hypersd_pipeline.data.cache_build import _Build, select_rows
    from hypersd_pipeline.data.config import DataConfig
    from hypersd_pipeline.data.rows import read_manifest, write_manifest
    from hypersd_pipeline.data.validate import validate
    from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

    splits = {"train": f"{{00000..{-(-rows // PER_SHARD) - 1:05d}}}.tar", "test": "test.tar"}
    data = DataConfig(source={"kind": "shards", "root": str(folder / "tars"), "splits": splits}, workers=2)
    teacher = load_teacher(TeacherConfig(), ("vae", "text"), "cpu") if name in ("plan", "again") else None
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if name == "validate":
        manifest, _ = validate(data.source, folder / "dataset", data.workers, complete=True)
        write_manifest(folder / "manifest", manifest)
        found = len(manifest.splits["train"])
    elif name == "manifest":
        manifest = read_manifest(folder / "manifest")
        found = len(manifest.splits["train"]) if manifest.key else 0
    elif name == "select":
        manifest = read_manifest(folder / "manifest")
        found = sum(1 for _ in select_rows(manifest.splits["train"], data.model_copy(update={"max_images": rows // 2})))
    elif teacher is not None:
        encoders = {"vae": "", "text": ""}
        build = _Build(folder / "cache", read_manifest(folder / "manifest"), data, teacher, encoders, whole=False)
        found = sum(len(part.missing) for part in build._parts() if part.name == "train")
        if name == "plan":
            peak, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter() - start
            for plan in (plan for plans in build._plans.values() for plan in plans):
                write_shard(folder / "cache" / plan.file, plan.key, plan.rows, {"mean": torch.zeros(len(plan.rows), 1)})
            return {"rows": found, "MB": (peak - before) / 1024, "MB with imports": peak / 1024, "seconds": seconds}
    else:
        with open(folder / CAPTIONS, "w", encoding="utf-8") as file:
            file.write(
                "[\n" + ",\n".join(f' "caption {i} of a photograph of a thing on a table, seen from above"' for i in range(rows)) + "\n]\n"
            )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # without what writing them took
        captions = read_captions(folder / CAPTIONS)
        found = len(captions) if captions[rows - 1] else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rows": found, "MB": (peak - before) / 1024, "MB with imports": peak / 1024, "seconds": time.perf_counter() - start}


def main() -> None:
    """Print a table of rows, memory and seconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step(options.step, options.folder, options.rows)))
        return
    with tempfile.TemporaryDirectory() as name:
        make_shards(Path(name) / "tars", options.rows)
        print("| step | rows | peak MB | with imports | seconds |\n|-|-|-|-|-|")
        for each in STEPS:
            command = [sys.executable, __file__, "--rows", str(options.rows), "--step", each, "--folder", name]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            values = json.loads(result.stdout.splitlines()[-1])
            row = [f"{values['rows']:.0f}", f"{values['MB']:.0f}", f"{values['MB with imports']:.0f}", f"{values['seconds']:.0f}"]
            print(f"| {each} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
