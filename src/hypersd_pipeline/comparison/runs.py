"""A run as a comparison sees it, and how it is read from a data folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.samples import read_samples
from hypersd_pipeline.evaluation.scores import FILE, PromptScores, read_scores

SAMPLES, TEACHER_SAMPLES, TEACHER = "samples_", "teacher_samples", "teacher"


@dataclass(frozen=True)
class Model:
    """A model of a run: its scores, and ``images(steps)`` of its first prompts."""

    scores: PromptScores
    images: Callable[[int], list[Image.Image]]


@dataclass(frozen=True)
class ComparedRun:
    """A run.

    Attributes:
        name: what a reader calls it. place: where it was read from, such as its id in MLflow.
        models: by name (``k4``, ``unified``, ``teacher``).
        train_seconds: of all stages together. peak_memory_mb: of the stage that took most. None where it is not known.
        wall_seconds: from start to end, with evaluations and pauses.
        parameters, data, code: what can differ, by name.
    """

    name: str
    place: str
    models: Mapping[str, Model]
    train_seconds: float | None = None
    peak_memory_mb: float | None = None
    wall_seconds: float | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)


Runs = Callable[[str], ComparedRun]
"""Finds a run by what the user calls it. Raises UserError where there is none."""


def model_name(samples: str) -> str | None:
    """The model whose samples are called so. None for another name."""
    if samples == TEACHER_SAMPLES:
        return TEACHER
    return samples.removeprefix(SAMPLES) if samples.startswith(SAMPLES) else None


def read_model(folder: Path) -> Model:
    """A model's folder of samples. Raises UserError where its scores are missing or damaged."""
    return Model(read_scores(folder), lambda steps: read_samples(folder, steps))


def read_run(folder: Path) -> ComparedRun:
    """The run whose results lie in a data folder, or in its ``08_reporting``. A folder knows neither parameters nor code.

    Raises:
        UserError: there are no scores in it.
    """
    root = folder / "08_reporting" if (folder / "08_reporting").is_dir() else folder
    found = {model_name(path.parent.name): path.parent for path in sorted(root.glob(f"*/{FILE}"))}
    models = {name: read_model(path) for name, path in found.items() if name}
    if not models:
        raise UserError(f"{root} holds no scores (samples_*/{FILE}); give a data folder whose models were evaluated since version 0.2.")
    reports = [json.loads(path.read_text()) for path in sorted(root.glob("report_*.json"))]
    return ComparedRun(
        name=folder.name or str(folder.resolve()),
        place=str(folder),
        models=models,
        train_seconds=total([report.get("train_seconds") for report in reports]),
        peak_memory_mb=max((report["peak_memory_mb"] for report in reports if report.get("peak_memory_mb")), default=None),
    )


def total(values: list[float | None]) -> float | None:
    """The sum. None where a part is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None
