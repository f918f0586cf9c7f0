"""The data preparation pipeline through Kedro's catalog and runner, on its own configuration."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pandas as pd
import pytest
import tiny
import yaml
from data.tars import image, sample, shards, write_tar
from kedro.io import DataCatalog
from kedro.io.core import DatasetError
from kedro.runner import SequentialRunner
from PIL import ExifTags, Image

from hypersd_pipeline.data import cache_build
from hypersd_pipeline.data import shards as shards_module
from hypersd_pipeline.data.config import DataConfig, TwemojiSource
from hypersd_pipeline.data.images import decode_image
from hypersd_pipeline.data.twemoji import TwemojiConfig
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.io.folder import FolderDataset
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.data_prep import create_pipeline
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.distributed import ComputeConfig

CONF = Path(__file__).parents[2] / "conf"


def catalog_in(root: Path, data: DataConfig, teacher: TeacherConfig, processes: int = 1) -> DataCatalog:
    """The project's own catalog entries, with paths under ``root``."""
    text = re.sub(r"\$\{data:(\w+)\}", rf"{root.as_posix()}/data/\1", (CONF / "base/catalog_data.yml").read_text())
    catalog = DataCatalog.from_config(yaml.safe_load(text))
    catalog["params:data"], catalog["params:teacher"] = data, teacher
    catalog["params:compute"], catalog["data_prep.checkpoints"] = ComputeConfig(processes=processes), CheckpointStore(root / "meeting")
    return catalog


def user_error_in(error: BaseException | None) -> str:
    """The UserError inside what Kedro wrapped around it, once or twice."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return str(error)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    return TeacherConfig(source=str(tiny.write_teacher(tmp_path_factory.mktemp("teacher"), "sd15")))


def test_embedded_scenes_go_through(tmp_path: Path, teacher: TeacherConfig) -> None:
    data = DataConfig(source={"kind": "twemoji", "train": 5, "val": 1, "test": 4, "test_unseen": 1}, shard_rows=3)
    catalog = catalog_in(tmp_path, data, teacher)
    SequentialRunner().run(create_pipeline(), catalog)
    cache, manifest = catalog.load("latents"), catalog.load("manifest")
    assert {name: len(cache.split(name)) for name in cache.splits} == {"train": 5, "val": 1, "test": 4, "test_unseen": 1}
    assert cache.parts["rows"] == manifest.key
    rejected = pd.read_csv(tmp_path / "data/08_reporting/rejected_rows.csv")
    assert list(rejected.columns) == ["file", "row", "split", "reason"] and rejected.empty

    scenes = catalog_in(tmp_path, DataConfig(source={**data.source.model_dump(), "train": 6}), teacher)
    SequentialRunner().run(create_pipeline().only_nodes("generate_dataset", "validate_rows"), scenes)
    with pytest.raises(DatasetError) as refusal:
        scenes.load("latents")
    assert "is stale: the data set has" in user_error_in(refusal.value)


def test_a_folder_of_ones_own_goes_through_where_it_lies(tmp_path: Path, teacher: TeacherConfig) -> None:
    own = tmp_path / "own"
    for split in ("train", "test"):
        (own / split).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (70, 90), (60 * i, 0, 200 * (split == "test"))).save(own / split / f"{i}.png")
            (own / split / f"{i}.txt").write_text(f"shade {i}" if i or split == "test" else " ")
    catalog = catalog_in(tmp_path / "project", DataConfig(source={"kind": "folder", "root": str(own)}), teacher)
    SequentialRunner().run(create_pipeline(), catalog)
    assert catalog.load("manifest").root == own and len(catalog.load("latents").split("train")) == 3
    rejected = pd.read_csv(tmp_path / "project/data/08_reporting/rejected_rows.csv")
    row = {"file": "train/0.png", "row": "0.png", "split": "train", "reason": "the caption is empty"}
    assert rejected.to_dict("records") == [row]


@pytest.mark.slow  # processes that import everything, twice two
def test_two_processes_prepare_the_same_bytes_as_one(tmp_path: Path, teacher: TeacherConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Shards from a folder, of which one is broken, and one has a broken image, on real processes."""
    caplog.set_level("INFO")
    tars = shards(tmp_path / "tars", count=5)
    os.truncate(tars / "00001.tar", 700)
    write_tar(tars / "00002.tar", [*sample("a", 1), ("b.jpg", image(2)[:-100]), ("b.txt", b"half an image"), *sample("c", 3)])
    source = {"kind": "shards", "root": str(tars), "splits": {"train": "{00000..00003}.tar", "test": "00004.tar"}}
    data = DataConfig(source=source, shard_rows=6, batch_size=5, workers=1)
    written = []
    for processes in (1, 2):
        catalog = catalog_in(tmp_path / str(processes), data, teacher, processes)
        SequentialRunner().run(create_pipeline(), catalog)
        folders = [tmp_path / str(processes) / "data" / name for name in ("03_primary/manifest", "05_model_input/latents", "08_reporting")]
        written.append({f"{folder.name}/{file.name}": file.read_bytes() for folder in folders for file in folder.iterdir()})
        assert len(catalog.load("latents").split("train")) == 18
    one, two = written
    assert one.keys() == two.keys() and len(one) > 10 and all(one[name] == two[name] for name in one)
    assert not list((tmp_path / "2/meeting").iterdir())
    log = caplog.text.rpartition("Running node: generate_dataset")[2]
    assert "train: 0 rows encoded" in log and "test: 0 rows encoded" in log, "the processes have left work to the one that started them"


def test_images_of_shards_are_decoded_once(tmp_path: Path, teacher: TeacherConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through filter, check and encoding. A broken image costs a second time, and so does each row where only some are cached."""
    tars = shards(tmp_path / "tars", count=2)
    files = [*sample("tall", 1, (16, 40)), *sample("wide", 2, (90, 16)), ("half.jpg", image(3)[:-100]), ("half.txt", b"half")]
    turned = Image.open(io.BytesIO(image(4, (30, 20))))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    write_tar(tars / "00002.tar", [*files, ("turned.jpg", buffer.getvalue()), ("turned.txt", b"turned")])
    source = {
        "kind": "shards",
        "root": str(tars),
        "splits": {"train": "{00001..00002}.tar", "test": "00000.tar"},
        "filters": {"aspect": [0.2, 3]},
    }
    data = DataConfig(source=source, shard_rows=4, batch_size=3, workers=2)
    decoded: list[tuple[int, int]] = []

    def counted(content: bytes) -> Image.Image:
        found = decode_image(content)
        decoded.append(found.size)
        return found

    for module in (cache_build, shards_module):
        monkeypatch.setattr(module, "decode_image", counted)
    catalog = catalog_in(tmp_path, data, teacher)
    SequentialRunner().run(create_pipeline(), catalog)
    manifest, cache = catalog.load("manifest"), catalog.load("latents")
    assert [row.image_id for row in manifest.splits["train"]][-2:] == ["00002.tar/tall", "00002.tar/turned"]
    assert (manifest.splits["train"][-1].width, manifest.splits["train"][-1].height) == (20, 30)
    assert len(decoded) == len(cache.split("train")) + len(cache.split("test")) == 18 and decoded.count((24, 16)) == 16
    rejected = pd.read_csv(tmp_path / "data/08_reporting/rejected_rows.csv")
    assert rejected[rejected.row == "half"].to_dict("records")[0]["reason"].startswith("the image cannot be read (image file is truncated")
    assert "filter: width / height is outside" in " ".join(rejected.reason) and len(rejected) == 2

    decoded.clear()
    again = catalog_in(tmp_path, data, teacher)
    SequentialRunner().run(create_pipeline(), again)
    assert not decoded and again.load("latents").key == cache.key and again.load("manifest").key == manifest.key
    twice = validate(data.source, tmp_path / "other", complete=True)[0]  # which decodes
    assert twice.key == manifest.key and len(decoded) == 19  # the one too, that the filter leaves out


def test_the_configuration_in_conf_is_valid_and_says_what_the_issue_asks() -> None:
    base = yaml.safe_load((CONF / "base/parameters_data_prep.yml").read_text())["data"]
    smoke = yaml.safe_load((CONF / "smoke/parameters_data_prep.yml").read_text())["data"]
    source = DataConfig(**base).source
    assert isinstance(source, TwemojiSource) and isinstance(source.scenes(), TwemojiConfig)
    assert (source.train, source.val, source.test, source.test_unseen) == (8000, 500, 1000, 500)
    assert DataConfig(**{**base, **smoke, "source": {**base["source"], **smoke["source"]}}).source.train < 1000
    other = DataConfig(**{**base, "source": {**base["source"], "kind": "coco", "root": "/data/coco"}})  # as the environments merge it
    assert set(other.source.splits) == {"train", "val", "test"}


def test_a_missing_folder_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as refusal:
        FolderDataset(filepath=str(tmp_path / "none")).load()
    assert "is missing; run" in user_error_in(refusal.value)
