"""Data preparation. Functions that write much return a writer, which the catalog calls with the path: the work happens on saving.

On several processes each of them checks some of the shards, and encodes some of the rows. They leave that on the disk, as an interrupted
run would. The process that started them then goes on as after an interruption, and finds nothing left to check or to encode.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from hypersd_pipeline.data.config import DataConfig, PromptsSource, ShardsSource, TwemojiSource
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.data.shards import check_some
from hypersd_pipeline.data.twemoji import write_dataset
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.processes import Place, on_processes


def generate_dataset(data: DataConfig) -> Callable[[Path], None]:
    """A writer of the embedded data set. For a data set of the user's own, of a note that says where it is."""
    if isinstance(data.source, TwemojiSource):
        return partial(write_dataset, config=data.source.scenes())
    place = data.source.file if isinstance(data.source, PromptsSource) else data.source.root
    return partial(_write_note, kind=data.source.kind, root=place)


def _write_note(path: Path, kind: str, root: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "source.json").write_text(json.dumps({"kind": kind, "root": root}, indent=2) + "\n", encoding="utf-8")


def validate_rows(dataset: Path, data: DataConfig, place: Place | None = None) -> tuple[Manifest, pd.DataFrame]:
    """The manifest of good rows, and the table of what was left out and why (file, row, split, reason).

    Args:
        place: how many processes check shards. Rows of other sources are checked by this one.

    Raises:
        UserError: the source is unusable, or has no split ``train``, no split ``test``, or too few rows in it.
    """
    others = partial(_check_share, dataset, data, place=place) if _several(place) else None
    return validate(data.source, dataset, data.workers, complete=True, others=others)


def cache_latents(manifest: Manifest, data: DataConfig, teacher: TeacherConfig, place: Place | None = None) -> Callable[[Path], None]:
    """A writer of the latent cache. ``place`` says how many processes encode."""
    return partial(_build, manifest=manifest, data=data, teacher=teacher, place=place)


def _build(path: Path, manifest: Manifest, data: DataConfig, teacher: TeacherConfig, place: Place | None) -> None:
    from hypersd_pipeline.data.cache_build import build_cache

    others = partial(_encode_share, path.absolute(), manifest, data, teacher, place=place) if _several(place) else None
    build_cache(path, manifest, data, load_teacher(teacher, parts=("vae", "text")), others)


# --- on several processes ----------------------------------------------------------------------------------------------------------------


def _several(place: Place | None) -> bool:
    return place is not None and place.compute.nodes * place.compute.here > 1


@on_processes
def _check_share(dataset: Path, data: DataConfig, place: Place | None = None) -> None:
    assert isinstance(data.source, ShardsSource)  # no other source asks for help
    check_some(data.source, dataset, data.workers, distributed.rank(), distributed.ranks(), distributed.wait)


@on_processes
def _encode_share(path: Path, manifest: Manifest, data: DataConfig, teacher: TeacherConfig, place: Place | None = None) -> None:
    from hypersd_pipeline.data.cache_build import fill_cache

    model = load_teacher(teacher, parts=("vae", "text"))
    fill_cache(path, manifest, data, model, distributed.rank(), distributed.ranks(), distributed.wait)
