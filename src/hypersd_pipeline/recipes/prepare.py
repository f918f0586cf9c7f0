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
from hypersd_pipeline.data.validate import validate, without_rows
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


def validate_rows(
    dataset: Path, data: DataConfig, place: Place | None = None, teacher: TeacherConfig | None = None, latents: Path | None = None
) -> tuple[Manifest, pd.DataFrame]:
    """The manifest of good rows, and the table of what was left out and why (file, row, split, reason).

    Args:
        place: how many processes check shards. Rows of other sources are checked by this one.
        teacher, latents: whose cache of which folder the rows of shards are for. They are encoded as soon as their images are decoded, and
            no image is decoded twice. Not where only some of the rows are cached (``data.max_images``).

    Raises:
        UserError: the source is unusable, or has no split ``train``, no split ``test``, or too few rows in it.
    """
    shards = data.source if isinstance(data.source, ShardsSource) else None
    if shards is None or teacher is None or latents is None or data.max_images is not None:
        return validate(data.source, dataset, data.workers, complete=True, others=_checked_by_others(dataset, data, place, decode=True))
    others = _checked_by_others(dataset, data, place, decode=False)
    manifest, refused = validate(shards, dataset, data.workers, complete=True, others=others, decode=False)
    bad = _encode_unchecked(latents, manifest, data, teacher, place)
    if not bad:
        return manifest, refused
    manifest, broken = without_rows(shards, manifest, bad)
    return manifest, pd.concat([refused, broken], ignore_index=True)


def cache_latents(manifest: Manifest, data: DataConfig, teacher: TeacherConfig, place: Place | None = None) -> Callable[[Path], None]:
    """A writer of the latent cache. ``place`` says how many processes encode."""
    return partial(_build, manifest=manifest, data=data, teacher=teacher, place=place)


def _build(path: Path, manifest: Manifest, data: DataConfig, teacher: TeacherConfig, place: Place | None) -> None:
    from hypersd_pipeline.data.cache_build import build_cache

    others = partial(_encode_share, path.absolute(), manifest, data, teacher, checked=True, place=place) if _several(place) else None
    build_cache(path, manifest, data, load_teacher(teacher, parts=("vae", "text")), others)


def _encode_unchecked(
    path: Path, manifest: Manifest, data: DataConfig, teacher: TeacherConfig, place: Place | None
) -> list[tuple[str, int, str]]:
    """Encode rows whose images nobody has decoded yet. What is wrong with those that are broken: split, number and reason."""
    from hypersd_pipeline.data.cache_build import broken_rows, fill_cache, is_full

    model = load_teacher(teacher, parts=("vae", "text"))
    if not is_full(path, manifest, data, model):
        if _several(place):
            _encode_share(path.absolute(), manifest, data, teacher, checked=False, place=place)
        else:
            fill_cache(path, manifest, data, model, 0, 1, checked=False)
    return broken_rows(path, manifest, data, model)


# --- on several processes ----------------------------------------------------------------------------------------------------------------


def _several(place: Place | None) -> bool:
    return place is not None and place.compute.nodes * place.compute.here > 1


def _checked_by_others(dataset: Path, data: DataConfig, place: Place | None, decode: bool) -> Callable[[], None] | None:
    return partial(_check_share, dataset, data, decode=decode, place=place) if _several(place) else None


@on_processes
def _check_share(dataset: Path, data: DataConfig, decode: bool, place: Place | None = None) -> None:
    assert isinstance(data.source, ShardsSource)  # no other source asks for help
    check_some(data.source, dataset, data.workers, distributed.rank(), distributed.ranks(), distributed.wait, decode)


@on_processes
def _encode_share(
    path: Path, manifest: Manifest, data: DataConfig, teacher: TeacherConfig, checked: bool, place: Place | None = None
) -> None:
    from hypersd_pipeline.data.cache_build import fill_cache

    model = load_teacher(teacher, parts=("vae", "text"))
    fill_cache(path, manifest, data, model, distributed.rank(), distributed.ranks(), distributed.wait, checked)
