"""Data preparation. Functions that write much return a writer, which the catalog calls with the path: the work happens on saving."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from hypersd_pipeline.data.config import DataConfig, PromptsSource, TwemojiSource
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.data.twemoji import write_dataset
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher


def generate_dataset(data: DataConfig) -> Callable[[Path], None]:
    """A writer of the embedded data set. For a data set of the user's own, of a note that says where it is."""
    if isinstance(data.source, TwemojiSource):
        return partial(write_dataset, config=data.source.scenes())
    place = data.source.file if isinstance(data.source, PromptsSource) else data.source.root
    return partial(_write_note, kind=data.source.kind, root=place)


def _write_note(path: Path, kind: str, root: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "source.json").write_text(json.dumps({"kind": kind, "root": root}, indent=2) + "\n", encoding="utf-8")


def validate_rows(dataset: Path, data: DataConfig) -> tuple[Manifest, pd.DataFrame]:
    """The manifest of good rows, and the table of what was left out and why (file, row, split, reason).

    Raises:
        UserError: the source is unusable, or has no split ``train``, no split ``test``, or too few rows in it.
    """
    return validate(data.source, dataset, data.workers, complete=True)


def cache_latents(manifest: Manifest, data: DataConfig, teacher: TeacherConfig) -> Callable[[Path], None]:
    """A writer of the latent cache."""
    return partial(_build, manifest=manifest, data=data, teacher=teacher)


def _build(path: Path, manifest: Manifest, data: DataConfig, teacher: TeacherConfig) -> None:
    from hypersd_pipeline.data.cache_build import build_cache

    build_cache(path, manifest, data, load_teacher(teacher, parts=("vae", "text")))
