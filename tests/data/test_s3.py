"""Tar shards in S3, on a real S3 server of this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import servers
from data.tars import sample, shards, write_tar

from hypersd_pipeline.data import stored
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.place import Place
from hypersd_pipeline.data.rows import Manifest, read_manifest, write_manifest
from hypersd_pipeline.data.stored import load_row, read_packed
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError

ALL = {"train": {"of": "0000[01].tar"}, "test": {"of": "00002.tar"}}
ROOT = "s3://images/laion/part"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """boto3's client of a server that this process's environment leads to."""
    import s3fs

    with servers.bucket("images") as (client, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # another test's server is gone
        stored.place_of.cache_clear()
        yield client


def upload(client: Any, folder: Path, into: str = "laion/part") -> None:
    for path in folder.iterdir():
        client.upload_file(str(path), "images", f"{into}/{path.name}")


def check(root: Path | str, dataset: Path, **extra: Any) -> tuple[Manifest, Any]:
    source = DataConfig(source={"kind": "shards", "root": str(root), "splits": ALL, **extra}).source
    return validate(source, dataset, workers=2, complete=True)


def test_rows_and_images_are_those_of_the_same_shards_in_a_folder(tmp_path: Path, s3: Any) -> None:
    root = shards(tmp_path / "tars")
    upload(s3, root)
    shares = {"train": {"share": [0, 0.7]}, "test": {"share": [0.7, 1]}}
    here, _ = check(root, tmp_path / "one", splits=shares)
    far, table = check(f"{ROOT}/", tmp_path / "two", splits=shares)  # the server lists its shards
    assert table.empty and far.key == here.key and far.address == ROOT
    write_manifest(tmp_path / "manifest", far)
    far = read_manifest(tmp_path / "manifest")
    rows = list(far.splits["train"])
    found = read_packed(far, rows)
    assert found == read_packed(here, list(here.splits["train"])) and len(found) == len(rows) > 10
    assert load_row(far, rows[0]).tobytes() == load_row(here, here.splits["train"][0]).tobytes()
    assert far.where(rows[0]) == f"{ROOT}/{rows[0].file}"


def test_a_shard_that_changed_is_checked_again_and_a_broken_one_is_skipped(tmp_path: Path, s3: Any, caplog: Any) -> None:
    root = shards(tmp_path / "tars")
    upload(s3, root)
    with caplog.at_level("INFO"):
        first, _ = check(ROOT, tmp_path / "dataset")
        assert check(ROOT, tmp_path / "dataset")[0].key == first.key and "3 of 3 shards were checked before" in caplog.text
        write_tar(root / "00001.tar", sample("x", 7))
        os.truncate(write_tar(root / "00000.tar", sample("y", 8)), 700)
        upload(s3, root)
        changed, table = check(ROOT, tmp_path / "dataset")
    assert "1 of 3 shards were checked before" in caplog.text and [row.image_id for row in changed.splits["train"]] == ["00001.tar/x"]
    assert [(file, row) for file, row in zip(table.file, table.row, strict=True)] == [("00000.tar", "(all)")]
    assert "the shard is skipped: unexpected end of data" in table.reason[0]


@pytest.mark.parametrize(
    ("root", "splits", "message"),
    [
        (ROOT, {"train": "{00000..00003}.tar", "test": "x.tar"}, r"s3://images/laion/part/00003\.tar is missing or cannot be reached"),
        ("s3://none/laion", {"train": "00000.tar", "test": "x.tar"}, r"s3://none/laion/00000\.tar is missing .*NoSuchBucket"),
        ("s3://images/elsewhere", None, r"no file below s3://images/elsewhere fits '\*\.tar'; check root, shards and splits"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, s3: Any, root: str, splits: Any, message: str) -> None:
    upload(s3, shards(tmp_path / "tars"))
    with pytest.raises(UserError, match=message) as error:
        check(root, tmp_path / "dataset", splits=splits)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_an_empty_object_and_one_that_went_are_named(tmp_path: Path, s3: Any) -> None:
    upload(s3, shards(tmp_path / "tars"))
    manifest, _ = check(ROOT, tmp_path / "dataset")
    s3.put_object(Bucket="images", Key="laion/part/00001.tar", Body=b"")
    with pytest.raises(UserError, match=r"00001\.tar is empty; fetch the file again"):
        check(ROOT, tmp_path / "dataset")
    s3.delete_object(Bucket="images", Key="laion/part/00000.tar")
    with pytest.raises(UserError, match=r"00000\.tar/000000000\.jpg: the shard cannot be read .*; put the file back, or run data_prep"):
        load_row(manifest, manifest.splits["train"][0])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules[fsspec.filesystem.__module__]._registry, "s3", raising=False)
    with pytest.raises(UserError, match=r"s3:// needs s3fs; install it with pip install 'hypersd-pipeline\[s3\]'"):
        Place("s3://images/laion")
