"""A few scenes, and a user's file of preferences on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from hypersd_pipeline.data.config import TwemojiSource
from hypersd_pipeline.data.preferences import PreferencesConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.data.twemoji import write_dataset
from hypersd_pipeline.data.validate import validate

SMALL = PreferencesConfig(images=160, test_images=40, degraded=1, wrong_captions=1, similar_captions=1, neighbours=5)
"""All of `write_scenes`, one pair of each kind for each image."""


def write_scenes(folder: Path) -> Manifest:
    """160 scenes to train on and 40 to test on."""
    source = TwemojiSource(kind="twemoji", train=160, val=1, test=40, test_unseen=1)
    write_dataset(folder, config=source.scenes())
    return validate(source, folder)[0]


def write_user_preferences(folder: Path, manifest: Manifest, n: int = 30) -> Path:
    """Clean scenes win against noise of the same size, a prompt each."""
    (folder / "images").mkdir()
    lines = []
    rng = np.random.default_rng(0)
    for i, row in enumerate(manifest.splits["train"][:n]):
        Image.open(manifest.path(row)).save(folder / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (80, 64, 3), dtype=np.uint8)).save(folder / "images" / f"{i}_noise.png")
        lines.append(json.dumps({"prompt": f"{row.captions[0]} {i}", "winner": f"images/{i}.png", "loser": f"images/{i}_noise.png"}))
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file
