"""Small worlds that tests share: images of a user's own, and a cache of them made by a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes.prepare import cache_latents, generate_dataset, validate_rows


def write_images(root: Path, n: int = 8) -> Path:
    """Random images of several sizes with a caption file each, as a user might bring them."""
    rng = np.random.default_rng(0)
    for i in range(n):
        split = root / ("test" if i % 4 == 3 else "train")
        split.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (72, 96 + 8 * i, 3), dtype=np.uint8)).save(split / f"{i:02d}.png")
        (split / f"{i:02d}.txt").write_text(tiny.CAPTIONS[i % len(tiny.CAPTIONS)])
    return root


def prepare(tmp_path: Path, teacher: TeacherConfig, **data_options: Any) -> LatentCache:
    """Data preparation, node by node."""
    source = {"kind": "folder", "root": str(write_images(tmp_path / "images", 16))}
    data = DataConfig(source=source, shard_rows=4, batch_size=3, workers=1, **data_options)
    generate_dataset(data)(tmp_path / "dataset")
    manifest, rejected = validate_rows(tmp_path / "dataset", data)
    assert rejected.empty and {name: len(rows) for name, rows in manifest.splits.items()} == {"train": 12, "test": 4}
    cache_latents(manifest, data, teacher)(tmp_path / "latents")
    return LatentCache(tmp_path / "latents")
