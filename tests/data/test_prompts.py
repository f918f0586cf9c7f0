"""Captions without images: files of three kinds, their faults, and a cache without latents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from pydantic import ValidationError

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.cache_build import build_cache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest, read_manifest, write_manifest
from hypersd_pipeline.data.stored import load_row
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

CAPTIONS = [f"a photo of {n} owls" for n in range(200)]
HALVES = {"train": {"share": [0, 0.5]}, "test": {"share": [0.5, 1]}}


def check(file: Path, **extra: Any) -> tuple[Manifest, pd.DataFrame]:
    return validate(DataConfig(source={"kind": "prompts", "file": str(file), **extra}).source, Path("unused"), complete=True)


def captions(manifest: Manifest) -> dict[str, str]:
    return {row.captions[0]: name for name, rows in manifest.splits.items() for row in rows}


def test_three_kinds_of_files_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeff" + "\n".join(CAPTIONS) + "\n\n" + CAPTIONS[3] + "\n")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": c}) for c in CAPTIONS))
    pd.DataFrame({"prompt": CAPTIONS, "other": 1}).to_parquet(tmp_path / "p.parquet")
    (text, table), (lines, _), (parquet, _) = (check(tmp_path / f"p.{kind}", column="prompt") for kind in ("txt", "jsonl", "parquet"))
    assert set(captions(text)) == set(CAPTIONS) and captions(text) == captions(lines) == captions(parquet)
    assert set(captions(text).values()) == {"train", "val", "test"}
    assert table.values.tolist() == [["p.txt", "1 rows", "(none)", "the caption stands there before"]]
    write_manifest(tmp_path / "manifest", text)
    assert read_manifest(tmp_path / "manifest").key == text.key
    with pytest.raises(UserError, match="prompts have no images"):
        load_row(text, text.splits["train"][0])


@pytest.mark.parametrize(
    ("name", "line", "row", "reason"),
    [
        ("p.txt", b"caf\xe9", "line 1", "the line is not UTF-8 text but perhaps Latin-1"),
        ("p.txt", b"a" * (2**20 + 9), "line 1", "the line has more than 1048576 bytes"),
        ("p.txt", b"a" * (2**22), "line 1", "the line has more than 1048576 bytes"),
        ("p.jsonl", b"[1]", "line 1", "the line is no JSON object"),
        ("p.jsonl", b'{"text": ""}', "line 1", "the caption is empty"),
        ("p.jsonl", b'{"text": 7}', "line 1", "the caption is no text"),
        ("p.jsonl", b'{"text": "\\ud800"}', "line 1", "lone surrogate"),
        ("p.jsonl", b'{"other": "x"}', "line 1", "the line has no key 'text'"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_used(tmp_path: Path, name: str, line: bytes, row: str, reason: str) -> None:
    good = [(c if name == "p.txt" else json.dumps({"text": c})).encode() for c in CAPTIONS]
    (tmp_path / name).write_bytes(b"\n".join([line, *good]))
    manifest, table = check(tmp_path / name)
    assert len(captions(manifest)) == len(CAPTIONS) and table.row.tolist() == [row] and reason in table.reason[0]


@pytest.mark.parametrize(
    ("make", "extra", "message"),
    [
        (lambda path: None, {}, "the file is missing; give a .txt"),
        (lambda path: path.mkdir(), {}, "no regular file but a folder"),
        (lambda path: path.write_text(""), {}, "has no captions"),
        (lambda path: path.write_text("one"), {"splits": HALVES}, "there is no split|has 0 rows|at least are needed"),
        (lambda path: path.write_text("one"), {"splits": {"train": {"share": [0, 1]}}}, "there is no split 'test'"),
    ],
)
def test_what_is_refused_as_a_whole(tmp_path: Path, make: Callable[[Path], Any], extra: dict[str, Any], message: str) -> None:
    make(tmp_path / "p.txt")
    with pytest.raises(UserError, match=message):
        check(tmp_path / "p.txt", **extra)


def test_other_files_and_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("text\nx\n")
    with pytest.raises(UserError, match=r"is a \.csv; give a \.txt, \.jsonl or \.parquet file"):
        check(tmp_path / "p.csv")
    pd.DataFrame({"prompt": CAPTIONS}).to_parquet(tmp_path / "p.parquet")
    with pytest.raises(UserError, match="has no column 'text' but prompt; name one of them"):
        check(tmp_path / "p.parquet")
    (tmp_path / "q.parquet").write_bytes(b"PAR1 hello")
    with pytest.raises(UserError, match="is damaged or no parquet file"):
        check(tmp_path / "q.parquet")
    with pytest.raises(ValidationError, match="shares of one file"):
        DataConfig(source={"kind": "prompts", "file": "p.txt", "splits": {"train": "a"}})


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_a_cache_of_prompts_has_text_and_no_latents(tmp_path: Path, layout: str) -> None:
    teacher = load_teacher(TeacherConfig(source=str(tiny.write_teacher(tmp_path / "teacher", layout))), ("vae", "text"), "cpu")
    (tmp_path / "p.txt").write_text("\n".join(CAPTIONS[:20]))
    data = DataConfig(source={"kind": "prompts", "file": str(tmp_path / "p.txt"), "splits": HALVES}, shard_rows=6)
    manifest, _ = validate(data.source, tmp_path, complete=True)
    build_cache(tmp_path / "cache", manifest, data, teacher)
    cache = LatentCache(tmp_path / "cache")
    train = cache.split("train")
    rows = torch.arange(len(train))
    assert len(train) == len(manifest.splits["train"]) and train.latent_shape == teacher.latent_shape
    texts = [row.captions[0] for row in manifest.splits["train"]]
    assert train.captions(rows) == texts
    cond, wanted = train.conditioning(rows), teacher.encode_prompts(texts)
    torch.testing.assert_close(cond.prompt_embeds, wanted.prompt_embeds)
    if layout == "sdxl":
        assert torch.equal(cond.sizes, teacher.unconditional(len(rows)).sizes)
    with pytest.raises(UserError, match="prompts have no images, and this stage trains on images"):
        train.sample(rows, None)
    with pytest.raises(IndexError):
        train.captions(torch.tensor([len(train)]))
