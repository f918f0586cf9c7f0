"""Images a second of data preparation against the bare loop of the VAE: the same batches of the same images, in turn.

    python benchmarks/cache_rate.py --layout sd15 --resolution 512 --images 24

The bare loop encodes pixels that lie in memory. Data preparation reads JPEGs from a tar, checks their hashes, decodes, resizes and crops
them, encodes, and writes shards. The VAE has the published size and random weights. What is done once for a cache is not counted: the plan
of its shards, and the encoders' numbers of a fixed image and prompt.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import hypersd_pipeline  # noqa: F401  # before anything imports torchvision
from hypersd_pipeline.data.cache_build import fill_cache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.images import fit
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.data.stored import load_row
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.models.public import public, write_random_teacher
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher


def small_unet(told: Mapping[str, Any]) -> dict[str, Any]:
    """The description with a UNet that takes no space: none is loaded here."""
    unet = told["networks"]["unet"]
    widths = [32 * 2 ** min(i, 1) for i in range(len(unet["config"]["block_out_channels"]))]
    config = {**unet["config"], "block_out_channels": widths, "layers_per_block": 1, "transformer_layers_per_block": 1}
    return {**told, "networks": {**told["networks"], "unet": {**unet, "config": config}}}


def make_tar(path: Path, images: int, width: int, height: int) -> None:
    """A tar of smooth photographs of noise, as JPEG of quality 90, with one caption."""
    path.parent.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(images):
            coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
            buffer = io.BytesIO()
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            for suffix, content in (("jpg", buffer.getvalue()), ("txt", b"a photograph")):
                info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def bare(teacher: Teacher, pixels: torch.Tensor, batch: int) -> float:
    """Seconds of the VAE alone: ``pixels`` uint8 ``[n, h, w, 3]``."""
    start = time.perf_counter()
    with torch.inference_mode():
        for some in pixels.split(batch):
            for part in teacher.encode_images(some.permute(0, 3, 1, 2).float() / 127.5 - 1):
                part.to("cpu", torch.float32)
    return time.perf_counter() - start


def prepared(teacher: Teacher, manifest: Manifest, data: DataConfig, folder: Path) -> float:
    """Seconds from the first read to the last shard."""
    started = 0.0

    def ready() -> None:
        nonlocal started
        started = time.perf_counter()

    folder.mkdir()
    fill_cache(folder, manifest, data, teacher, 0, 1, ready)
    return time.perf_counter() - started


def main() -> None:
    """Print images a second of both, and the ratio of each round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layout", choices=("shipped", "sd15", "sdxl"), default="sd15")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--width", type=int, default=768, help="of the JPEGs, which are 3 : 2")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        config = TeacherConfig()
        if options.layout != "shipped":
            write_random_teacher(work / "teacher", small_unet(public(options.layout)), None)
            config = TeacherConfig(source=str(work / "teacher"), resolution=options.resolution)
        teacher = load_teacher(config, ("vae", "text"))
        make_tar(work / "tars/0.tar", options.images, options.width, options.width * 2 // 3)
        source = {"kind": "shards", "root": str(work / "tars"), "splits": {"train": "0.tar"}}
        data = DataConfig(source=source, batch_size=options.batch, workers=options.workers)
        manifest, _ = validate(data.source, work / "dataset", options.workers)
        pixels = torch.from_numpy(np.stack([fit(load_row(manifest, row), teacher.resolution)[0] for row in manifest.splits["train"]]))
        bare(teacher, pixels[: options.batch], options.batch)  # warm
        rounds = []
        for number in range(options.rounds):
            rounds.append((bare(teacher, pixels, options.batch), prepared(teacher, manifest, data, work / f"cache{number}")))
    rates = [options.images / statistics.median(times) for times in zip(*rounds, strict=True)]
    ratios = [one / other for one, other in rounds]
    print(json.dumps({"ratio of each round": [round(ratio, 3) for ratio in ratios]}))
    print("| VAE | pixels | bare loop, images/s | data preparation, images/s | ratio (median of rounds) |\n|-|-|-|-|-|")
    print(f"| {options.layout} | {teacher.resolution} | {rates[0]:.3g} | {rates[1]:.3g} | {statistics.median(ratios):.3f} |")


if __name__ == "__main__":
    main()
