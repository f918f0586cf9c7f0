"""A tiny random checkpoint of each layout goes through data preparation, one TSCD stage and sampling with diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.pipelines.data_prep.nodes import cache_latents, generate_dataset, validate_rows

LAYOUTS = ("sd15", "sdxl")


def write_pictures(root: Path, n: int = 8) -> Path:
    """Random pictures of several sizes with a caption file each, as a user might bring them."""
    rng = np.random.default_rng(0)
    for i in range(n):
        split = root / ("test" if i % 4 == 3 else "train")
        split.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (72, 96 + 8 * i, 3), dtype=np.uint8)).save(split / f"{i}.png")
        (split / f"{i}.txt").write_text(tiny.CAPTIONS[i % len(tiny.CAPTIONS)])
    return root


def prepare(tmp_path: Path, teacher: TeacherConfig) -> LatentCache:
    """Data preparation, node by node."""
    data = DataConfig(source={"kind": "folder", "root": str(write_pictures(tmp_path / "pictures"))}, shard_rows=4, batch_size=3, workers=1)
    generate_dataset(data)(tmp_path / "dataset")
    manifest, rejected = validate_rows(tmp_path / "dataset", data)
    assert rejected.empty and {name: len(rows) for name, rows in manifest.splits.items()} == {"train": 6, "test": 2}
    cache_latents(manifest, data, teacher)(tmp_path / "latents")
    return LatentCache(tmp_path / "latents")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_preparation_keeps_what_the_layout_needs(tmp_path, layout):
    config = TeacherConfig(source=str(tiny.write_teacher(tmp_path, layout)))
    train = prepare(tmp_path, config).split("train")
    teacher = load_teacher(config, ("text",), "cpu")
    indices = torch.tensor([0, 5])
    cond = train.conditioning(indices)
    expected = teacher.encode_prompts(train.captions(indices))
    torch.testing.assert_close(cond.prompt_embeds, expected.prompt_embeds)
    assert train.latent_shape == (4, 8, 8)
    if layout == "sdxl":
        torch.testing.assert_close(cond.pooled, expected.pooled)
        # 72 pixels high become 64; the crop is the middle of what is then wider
        widths = [96, 96 + 8 * 6]
        crops = [(round(w * 64 / 72) - 64) // 2 for w in widths]
        assert cond.time_ids.tolist() == [[72, w, 0, left, 64, 64] for w, left in zip(widths, crops, strict=True)]
    torch.testing.assert_close(train.unconditional(1).prompt_embeds, teacher.unconditional(1).prompt_embeds)
