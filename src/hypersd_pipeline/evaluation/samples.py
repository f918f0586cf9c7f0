"""Sample images of a model in a folder, by number of steps and row."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def write_samples(folder: Path, samples: Mapping[int, list[Image.Image]]) -> None:
    """Write ``<steps>_steps/<row>.png``. What an earlier run left is removed."""
    for stale in folder.glob("*_steps"):
        shutil.rmtree(stale)
    for steps, images in samples.items():
        target = folder / f"{steps}_steps"
        target.mkdir()
        for row, image in enumerate(images):
            image.save(target / f"{row:02d}.png")


def read_samples(folder: Path, steps: int) -> list[Image.Image]:
    """The images of one number of steps, by row. None where they were not made."""
    return [Image.open(path, formats=["PNG"]).convert("RGB") for path in sorted((folder / f"{steps}_steps").glob("*.png"))]


def steps_label(n: int) -> str:
    """``1 step``, ``4 steps``."""
    return "1 step" if n == 1 else f"{n} steps"
