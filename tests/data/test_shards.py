"""Tar shards from a folder and from a real HTTP server: rows, filters, faults, and what is not read twice."""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import torch
from data.tars import image, sample, served, shards, write_tar
from pydantic import ValidationError
from ranks import on_ranks

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.cache_build import build_cache
from hypersd_pipeline.data.config import DataConfig, ShardsSource
from hypersd_pipeline.data.place import SPAN, spans
from hypersd_pipeline.data.rows import Manifest, read_manifest, write_manifest
from hypersd_pipeline.data.shards import check_shards, check_some
from hypersd_pipeline.data.stored import load_row, read_packed, read_row
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.training import distributed

ALL = {"train": {"of": "{00000..00001}.tar"}, "test": {"of": "00002.tar"}}


def check(root: Path | str, dataset: Path, complete: bool = False, **extra: Any) -> tuple[Manifest, pd.DataFrame]:
    source = DataConfig(source={"kind": "shards", "root": str(root), "splits": ALL, **extra}).source
    return validate(source, dataset, workers=2, complete=complete)


def reason(table: pd.DataFrame, file: str) -> str:
    return "; ".join(table[table.file == file].reason)


# --- good shards -------------------------------------------------------------------------------------------------------------------------


def test_rows_of_shards_have_the_images_bytes(tmp_path: Path) -> None:
    root = shards(tmp_path / "tars")
    manifest, table = check(root, tmp_path / "dataset", complete=True)
    assert table.empty and {name: len(rows) for name, rows in manifest.splits.items()} == {"train": 16, "test": 8}
    row = manifest.splits["train"][9]
    assert (row.image_id, row.file, row.captions) == ("00001.tar/000010001", "00001.tar/000010001.jpg", ("caption of 000010001",))
    assert (row.width, row.height, row.sha256) == (24, 16, hashlib.sha256(image(101)).hexdigest())
    with tarfile.open(root / "00001.tar") as tar:  # against the library that wrote it
        assert read_row(manifest, row) == tar.extractfile("000010001.jpg").read() == image(101)
    assert load_row(manifest, row).size == (24, 16)
    rows = list(manifest.splits["train"])
    assert read_packed(manifest, rows) == {i: read_row(manifest, row) for i, row in enumerate(rows)}

    write_manifest(tmp_path / "manifest", manifest)
    again = read_manifest(tmp_path / "manifest")
    assert again.splits == manifest.splits and again.key == manifest.key
    assert read_row(again, again.splits["train"][9]) == image(101)


def test_without_splits_a_hash_divides_and_more_shards_move_no_image(tmp_path: Path) -> None:
    def split_of(manifest: Manifest) -> dict[str, str]:
        return {row.image_id: name for name, rows in manifest.splits.items() for row in rows}

    few = split_of(check(shards(tmp_path / "tars", 3, 40), tmp_path / "dataset", splits=None)[0])
    more = split_of(check(shards(tmp_path / "tars", 5, 40), tmp_path / "dataset", splits=None)[0])
    assert len(few) == 120 and len(more) == 200 and set(few.values()) == {"train", "val", "test"}
    assert all(more[image_id] == name for image_id, name in few.items())


def test_captions_come_from_json_where_there_is_no_text(tmp_path: Path) -> None:
    root = shards(tmp_path / "tars")
    write_tar(
        root / "00000.tar",
        [("a.png", image(1, kind="PNG")), ("a.json", b'{"TEXT": "an owl"}'), ("b.webp", image(2, kind="WEBP")), ("b.txt", b"two\nlines")],
    )
    manifest, table = check(root, tmp_path / "dataset", caption_key="TEXT")
    assert table.empty and [row.captions for row in manifest.splits["train"]][:2] == [("an owl",), ("two", "lines")]


def test_a_shard_is_read_once_until_it_or_the_filters_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    root = shards(tmp_path / "tars")
    first, _ = check(root, tmp_path / "dataset")
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dataset/checked").iterdir()}
    assert len(parts) == 6
    assert check(root, tmp_path / "dataset")[0].key == first.key and "3 of 3 shards were checked before" in caplog.text
    assert parts == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dataset/checked").iterdir()}
    write_tar(root / "00001.tar", sample("x", 7))
    changed, _ = check(root, tmp_path / "dataset")
    assert "2 of 3 shards were checked before" in caplog.text and len(changed.splits["train"]) == 9
    assert len(list((tmp_path / "dataset/checked").iterdir())) == 6
    next((tmp_path / "dataset/checked").glob("*.jsonl")).write_text("damaged")
    assert check(root, tmp_path / "dataset")[0].key == changed.key
    assert len(check(root, tmp_path / "dataset", filters={"scores": {"aesthetic": [4, None]}})[0].splits["test"]) == 4


def test_an_interrupted_run_keeps_the_shards_that_are_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    root = shards(tmp_path / "tars")
    check(root, tmp_path / "dataset")
    for path in sorted((tmp_path / "dataset/checked").glob("*.json"))[:2]:  # killed before the reports of two shards were written
        path.unlink()
    assert len(check(root, tmp_path / "dataset")[0].splits["train"]) == 16 and "1 of 3 shards were checked before" in caplog.text


def test_each_process_checks_some_shards_and_all_are_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = DataConfig(source={"kind": "shards", "root": str(shards(tmp_path / "tars", count=5)), "shards": "*.tar"}).source
    expected, _ = check_shards(source, tmp_path / "one", 2)

    def some() -> int:
        check_some(source, tmp_path / "five", 2, distributed.rank(), distributed.ranks(), distributed.wait)
        return 0

    found, _ = check_shards(source, tmp_path / "five", 2, lambda: on_ranks(2, tmp_path / "ranks", some))  # type: ignore[arg-type, return-value]
    assert found == expected and {path.name for path in (tmp_path / "five/checked").iterdir()} == {
        path.name for path in (tmp_path / "one/checked").iterdir()
    }
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "five/checked").iterdir()}
    assert check_shards(source, tmp_path / "five", 2, lambda: pytest.fail("all were checked"))[0] == expected
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_http(tmp_path: Path) -> None:
    root = shards(tmp_path / "tars")
    here, _ = check(root, tmp_path / "one")
    with served(root) as server:
        far, table = check(server.address, tmp_path / "two")
        assert table.empty and far.key == here.key and far.address == server.address
        write_manifest(tmp_path / "manifest", far)
        far = read_manifest(tmp_path / "manifest")
        rows = list(far.splits["train"])
        before = server.parts
        assert read_packed(far, rows) == read_packed(here, list(here.splits["train"]))
        assert server.parts == before + 2  # one request for each shard
        with pytest.raises(UserError, match=r"\d\.tar is missing or cannot be reached.*; put the file there, or correct data\.source"):
            check(server.address, tmp_path / "two", splits={"train": "{00000..00009}.tar"})
        with pytest.raises(UserError, match=r"http cannot list files; write '\*.tar' with braces"):
            check(server.address, tmp_path / "two", splits=None)
    with served(root, ranges=False) as server, pytest.raises(UserError, match="the server gives no parts of a file"):
        check(server.address, tmp_path / "three")
    with pytest.raises(UserError, match=r"is missing or cannot be reached .*ClientConnectorError"):
        check(server.address, tmp_path / "three")


def test_parts_that_lie_close_are_read_at_once() -> None:
    assert list(spans([(4096, 10), (512, 100), (2**24, 5)])) == [(512, 3594), (2**24, 5)]
    assert all(size <= SPAN for _, size in spans([(i * 2**20, 2**20) for i in range(200)]))


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_latents_of_shards_are_those_of_the_same_images_in_a_folder(tmp_path: Path, layout: str) -> None:
    teacher: Teacher = load_teacher(TeacherConfig(source=str(tiny.write_teacher(tmp_path / "teacher", layout))), ("vae", "text"), "cpu")
    root = shards(tmp_path / "tars")
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        for number in numbers:
            with tarfile.open(root / f"{number:05d}.tar") as tar:
                tar.extractall(tmp_path / "images" / split, filter="data")
    for json_file in (tmp_path / "images").rglob("*.json"):
        json_file.unlink()
    caches = []
    for name, source in (
        ("tars", {"kind": "shards", "root": str(root), "splits": ALL}),
        ("files", {"kind": "folder", "root": str(tmp_path / "images")}),
    ):
        data = DataConfig(source=source, shard_rows=6, batch_size=4, workers=2)
        build_cache(tmp_path / "work" / name / "cache", validate(data.source, tmp_path / "work" / name / "dataset")[0], data, teacher)
        caches.append(LatentCache(tmp_path / "work" / name / "cache"))
    rows = torch.arange(16)
    one, two = (cache.split("train") for cache in caches)
    assert torch.equal(one.sample(rows, None), two.sample(rows, None)) and one.captions(rows) == two.captions(rows)
    if layout == "sdxl":
        assert torch.equal(one.conditioning(rows).sizes, two.conditioning(rows).sizes)


# --- filters -----------------------------------------------------------------------------------------------------------------------------


def test_filters_leave_out_and_count_by_reason(tmp_path: Path) -> None:
    root = shards(tmp_path / "tars")
    write_tar(
        root / "00002.tar",
        [
            *sample("big", 1, (64, 64), aesthetic=6),
            *sample("wide", 2, (128, 40), aesthetic=6),
            *sample("none", 3),
            *sample("nan", 4, aesthetic=float("nan")),
        ],
    )
    filters = {"min_side": 20, "aspect": [0.5, 2], "scores": {"aesthetic": [5, None]}}
    manifest, table = check(root, tmp_path / "dataset", splits={"test": "00002.tar"}, filters=filters)
    assert [row.image_id for row in manifest.splits["test"]] == ["00002.tar/big"]
    assert sorted(zip(table.row, table.reason, strict=True)) == [
        ("1 rows", "filter: width / height is outside 0.5 to 2"),
        ("2 rows", "filter: aesthetic is missing or no number"),
    ]
    scores = {"aesthetic": [2, None], "pwatermark": [None, 0.5], "similarity": [0.3, 0.3]}
    manifest, table = check(root, tmp_path / "dataset", filters={"scores": scores}, splits={"test": "00000.tar"})
    assert [row.image_id[-1] for row in manifest.splits["test"]] == ["2", "3", "4", "5"]
    assert reason(table, "00000.tar") == "filter: aesthetic is below 2; filter: pwatermark is above 0.5"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filters": {"aspect": [2, 1]}}, "give the smaller number first"),
        ({"filters": {"scores": {"aesthetic": [5, 4]}}}, "scores.aesthetic is"),
        ({"filters": {"scores": {"aesthetic": [float("nan"), None]}}}, "finite"),
        ({"root": "pipe:cat /etc/passwd"}, "is a pipe: address, which runs a command"),
        ({"root": "pipe:curl -s http://x/{0..9}.tar"}, "is a pipe: address, which runs a command"),
        ({"root": "file:///data"}, "has the scheme 'file', which is not read"),
        ({"root": "simplecache::s3://a/b"}, "has the scheme 'simplecache', which is not read"),
        ({"root": "s3://a/b::zip://c"}, "has the scheme 's3', which is not read"),
        ({"root": "https://user:secret@host/x"}, "without password"),
        ({"root": "https://host/x?token=secret"}, "without password"),
        ({"shards": "../{0..9}.tar"}, "leads out of root"),
        ({"splits": {"train": "pipe:/../x.tar"}}, "leads out of root"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        ShardsSource.model_validate({"kind": "shards", "root": "/data", **change})
    assert message in str(error.value) and not ("password" in message and "user:secret@" in str(error.value).partition("[type=")[0])


# --- faults ------------------------------------------------------------------------------------------------------------------------------


def info(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


GOOD = [*sample("good", 1), *sample("fine", 2)]
# name -> files beside the good samples, the file in the table, the reason there
REJECTED: dict[str, tuple[list[Any], str, str]] = {
    "a path that leads out": ([("../x.jpg", image(3)), ("../x.txt", b"x")], "00000.tar/../x.jpg", "leads out of the images' folder"),
    "an absolute path": ([("/etc/x.jpg", image(3))], "00000.tar//etc/x.jpg", "leads out"),
    "a symbolic link": ([info("x.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("x.txt", b"x")], "00000.tar/x.jpg", "no regular file but a link"),
    "a hard link": ([info("x.jpg", tarfile.LNKTYPE, "good.jpg"), ("x.txt", b"x")], "00000.tar/x.jpg", "no regular file but a link"),
    "a device": ([info("x.jpg", tarfile.CHRTYPE)], "00000.tar/x.jpg", "a device or a pipe"),
    "a pipe": ([info("x.txt", tarfile.FIFOTYPE)], "00000.tar/x.txt", "a device or a pipe"),
    "a name that is not UTF-8": ([("\udcff.jpg", image(3)), ("\udcff.txt", b"x")], "00000.tar/\\udcff.jpg", "no valid UTF-8"),
    "no caption": ([("x.jpg", image(3))], "00000.tar/x", "there is no caption: no .txt, and no text 'caption' in a .json"),
    "an empty caption": ([("x.jpg", image(3)), ("x.txt", b" \n")], "00000.tar/x", "the caption is empty"),
    "a Latin-1 caption": ([("x.jpg", image(3)), ("x.txt", b"caf\xe9")], "00000.tar/x", "the .txt is not UTF-8 text but perhaps Latin-1"),
    "a lone surrogate": ([("x.jpg", image(3)), ("x.json", b'{"caption": "\\ud800"}')], "00000.tar/x", "lone surrogate"),
    "a huge caption": ([("x.jpg", image(3)), ("x.txt", b"a" * (2**20 + 1))], "00000.tar/x.txt", "1048576 at most are read"),
    "a list as JSON": ([("x.jpg", image(3)), ("x.txt", b"x"), ("x.json", b"[1]")], "00000.tar/x", "the .json is no JSON object"),
    "broken JSON": ([("x.jpg", image(3)), ("x.txt", b"x"), ("x.json", b"{")], "00000.tar/x", "the .json cannot be read"),
    "deep JSON": ([("x.jpg", image(3)), ("x.json", b"[" * 10**5)], "00000.tar/x", "nested too deeply"),
    "a number as caption": ([("x.jpg", image(3)), ("x.json", b'{"caption": 7}')], "00000.tar/x", "there is no caption"),
    "no image": ([("x.txt", b"x")], "00000.tar/x", "there is no image"),
    "two images": ([("x.jpg", image(3)), ("x.png", image(3)), ("x.txt", b"x")], "00000.tar/x", "there are 2 images of one key"),
    "a broken image": ([("x.jpg", image(3)[:200]), ("x.txt", b"x")], "00000.tar/x", "the image cannot be read"),
    "text as image": ([("x.jpg", b"hello"), ("x.txt", b"x")], "00000.tar/x", "no known image format"),
    "a GIF as .jpg": ([("x.jpg", image(3, kind="GIF")), ("x.txt", b"x")], "00000.tar/x", "the image is GIF, which is not read"),
    "the same file twice": (
        [("x.jpg", image(3)), ("x.jpg", image(4)), ("x.txt", b"x")],
        "00000.tar",
        "a second file of the same name: x.jpg",
    ),
    "the same key later": ([*sample("x", 3), *sample("y", 4), *sample("x", 5)], "00000.tar/x", "duplicate key"),
    "pickles": ([("x.jpg", image(3)), ("x.txt", b"x"), ("x.pyd", b"cos\nsystem\n(S'exit 1'\ntR.")], "00000.tar", "files .pyd are not read"),
    "no suffix": ([("README", b"x")], "00000.tar", "files without a suffix are not read"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_bad_sample_is_named_and_the_others_are_used(tmp_path: Path, name: str) -> None:
    files, file, why = REJECTED[name]
    write_tar(tmp_path / "tars/00000.tar", [*sample("first", 0), *files, *GOOD])
    manifest, table = check(tmp_path / "tars", tmp_path / "dataset", splits={"train": "00000.tar"})
    assert why in reason(table, file), table.to_string()
    keys = [row.image_id.removeprefix("00000.tar/") for row in manifest.splits["train"]]
    assert [key for key in keys if key not in "xy"] == ["first", "good", "fine"]
    write_manifest(tmp_path / "manifest", manifest)
    table.to_csv(tmp_path / "rejected.csv")


def huge_header(path: Path) -> None:
    made = info("x", tarfile.XHDTYPE)
    made.size = 10 * 2**30
    with open(path, "ab") as file:
        file.write(made.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 10 * 2**30)  # a hole: it takes no space


def second(path: Path) -> int:
    """Where the header of the second file begins."""
    with tarfile.open(path) as tar:
        return tar.getmembers()[1].offset


def spoil(path: Path, at: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(content)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut in a file": (lambda path: os.truncate(path, 700), "unexpected end of data"),
    "cut in a header": (lambda path: os.truncate(path, 300), "it ends in the middle of a header"),
    "no end mark": (lambda path: os.truncate(path, second(path)), "it ends without an end mark"),
    "a header in between spoilt": (lambda path: spoil(path, second(path), b"garbage" * 60), "the tar is damaged"),
    "no tar": (lambda path: path.write_bytes(b"hello" * 1000), "the tar is damaged or compressed"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b" + os.urandom(2000)), "the tar is damaged or compressed"),
    "a header of ten gigabytes": (lambda path: (path.write_bytes(b""), huge_header(path)), "a header of 10737418240 bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_shard_is_named_and_skipped(tmp_path: Path, name: str) -> None:
    change, why = BROKEN[name]
    root = shards(tmp_path / "tars")
    write_tar(root / "00000.tar", GOOD)
    change(root / "00000.tar")
    manifest, table = check(root, tmp_path / "dataset", complete=True)
    assert len(manifest.splits["train"]) == 8 and len(table) == 1, table.to_string()
    assert table.row[0] == "(all)" and "the shard is skipped: " in table.reason[0] and why in table.reason[0], table.reason[0]


def test_a_huge_member_is_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "tars/00000.tar", sample("first", 0))
    made = info("x.jpg", tarfile.REGTYPE)
    made.size = 2**29
    with tarfile.open(path) as tar:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar)
    spoil(path, end, made.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, end + 512 + made.size + 1024)
    _, table = check(tmp_path / "tars", tmp_path / "dataset", splits={"train": "00000.tar"})
    assert "the file has 536870912 bytes" in reason(table, "00000.tar/x.jpg")


@pytest.mark.parametrize(
    ("change", "source", "message"),
    [
        (lambda root: (root / "00001.tar").unlink(), {}, r"00001\.tar: the file is missing; put the file there"),
        (lambda root: (root / "00001.tar").write_bytes(b""), {}, r"00001\.tar is empty; fetch the file again"),
        (lambda root: ((root / "00001.tar").unlink(), os.mkfifo(root / "00001.tar")), {}, "no regular file but a named pipe"),
        (lambda root: ((root / "00001.tar").unlink(), (root / "00001.tar").symlink_to("/etc/passwd")), {}, "leads out of the root"),
        (lambda root: None, {"splits": {"train": "{0..9.tar", "test": "x"}}, "a brace without its partner"),
        (lambda root: None, {"splits": {"train": "{0..9999999999}.tar", "test": "x"}}, "means more than 1000000 shards"),
        (lambda root: None, {"splits": {"train": "x*.tar", "test": "x"}}, "no file below .* fits 'x\\*.tar'"),
        (lambda root: None, {"splits": {"train": "0000*.tar", "test": "00002.tar"}}, "both have 00002.tar; give each split its own"),
        (lambda root: None, {"filters": {"min_side": 4000}}, "has no images .*filter: the shorter side is below 4000"),
        (lambda root: None, {"root": "/nowhere"}, "is not a folder; give the folder that holds the shards"),
        (lambda root: None, {"splits": {"train": "00000.tar"}}, "there is no split 'test'"),
    ],
)
def test_what_is_refused_as_a_whole(tmp_path: Path, change: Callable[[Path], Any], source: dict[str, Any], message: str) -> None:
    root = shards(tmp_path / "tars")
    change(root)
    with pytest.raises(UserError, match=message) as error:
        check(source.pop("root", root), tmp_path / "dataset", complete=True, **source)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
