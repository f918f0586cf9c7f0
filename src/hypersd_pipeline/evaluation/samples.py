"""Sample images of a model in a folder, by number of steps and row, and the scores of all its prompts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from hypersd_pipeline.evaluation.scores import PromptScores, write_scores


def write_samples(folder: Path, samples: Mapping[int, list[Image.Image]], scores: PromptScores | None = None) -> None:
    """Write ``<steps>_steps/<row>.png``, and ``scores.safetensors``. What an earlier run left is removed."""
    for stale in folder.glob("*_steps"):
        shutil.rmtree(stale)
    for steps, images in samples.items():
        target = folder / f"{steps}_steps"
        target.mkdir()
        for row, image in enumerate(images):
            image.save(target / f"{row:02d}.png")
    if scores is not None:
        write_scores(folder, scores)


def read_samples(folder: Path, steps: int) -> list[Image.Image]:
    """The images of one number of steps, by row. None where they were not made."""
    return [Image.open(path, formats=["PNG"]).convert("RGB") for path in sorted((folder / f"{steps}_steps").glob("*.png"))]


def steps_label(n: int) -> str:
    """``1 step``, ``4 steps``."""
    return "1 step" if n == 1 else f"{n} steps"
