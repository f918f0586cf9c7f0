"""Whatever lies in a folder or stands in a file: nothing but a UserError is raised, and every file and row is accounted for."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.coco import instance_fault
from hypersd_pipeline.data.config import CocoSource, FolderSource
from hypersd_pipeline.data.images import decode_image
from hypersd_pipeline.data.preferences import read_preferences
from hypersd_pipeline.data.reading import BadFile, printable
from hypersd_pipeline.data.rows import Manifest, read_manifest, write_manifest
from hypersd_pipeline.data.twemoji import TwemojiConfig, write_dataset
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.perception.annotations import decode_mask

ANY = settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (12, 9)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(len(kind)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


GOOD = {kind: saved(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")}
GOOD |= {"PNG " + mode: saved("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def spoilt(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Content with some bytes changed, cut off or put in."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        what = draw(st.sampled_from(("change", "cut", "insert")))
        if what == "cut":
            del content[at : at + draw(st.integers(1, 40))]
        elif what == "insert":
            content[at:at] = draw(st.binary(max_size=6))
        elif content:
            content[at] = draw(st.integers(0, 255))
    return bytes(content)


IMAGES = st.sampled_from(sorted(GOOD)).map(GOOD.__getitem__)
CONTENTS = st.binary(max_size=60) | st.text(max_size=30).map(lambda t: t.encode("utf-8", "surrogatepass")) | IMAGES | spoilt(IMAGES)
SUFFIXES = (".png", ".jpg", ".JPEG", ".webp", ".bmp", ".gif", ".tif", ".txt", ".txt", ".json", ".TXT", "", ".jfif", ".png.txt")
NAMES = st.builds(
    lambda folder, stem, suffix: folder + stem + suffix,
    st.sampled_from(("", "sub/", "sub/deep/", "other.png/", ".hidden/")),
    st.sampled_from(("a", "b", "c", "é", "x y", ".h", "\udcff", "a.b", "good")),
    st.sampled_from(SUFFIXES),
)


def write(root: Path, files: dict[str, bytes]) -> list[str]:
    """Write the files and say what lies there, hidden ones left out."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            path.write_bytes(content)
    found = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return [name for name in found if not any(part.startswith(".") for part in PurePosixPath(name).parts)]


def whole(manifest: Manifest, table: pd.DataFrame, folder: Path) -> None:
    """The results can be written and read, and every line has a reason."""
    write_manifest(folder / "manifest", manifest)
    assert read_manifest(folder / "manifest").splits == manifest.splits
    table.to_csv(folder / "rejected.csv")
    assert all(table.reason.str.len() > 5) and not table.reason.str.contains("\n").any()


@ANY
@given(st.dictionaries(NAMES, CONTENTS, max_size=10))
def test_any_folder(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        there = write(root, {"best.png": GOOD["PNG"], "best.txt": b"the best", **files})
        manifest, table = validate(FolderSource(kind="folder", root=str(root), splits={"train": "."}), Path(folder) / "x", workers=1)
        used = {row.file for row in manifest.splits["train"]}
        refused = set(table.file)
        sides = {PurePosixPath(name).with_suffix(".txt").as_posix() for name in (*used, *refused)}
        assert "best.png" in used
        assert [name for name in there if name not in used | sides and printable(name) not in refused] == []
        assert len(table) == len(table.drop_duplicates())
        whole(manifest, table, Path(folder))


RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "file_name": st.sampled_from(("a.png", "./a.png", "b.png", "sub/../b.png", "sub/c.png", "/etc/passwd", "a.png/", "\ud800")) | JSON,
        "file": JSON,
        "text": st.text(max_size=5) | JSON,
        "captions": st.lists(st.text(max_size=4), max_size=3) | JSON,
    },
)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


LINES = st.lists(RECORDS.map(dumped) | JSON.map(dumped) | st.binary(max_size=30) | spoilt(RECORDS.map(dumped)), max_size=8)


@ANY
@given(LINES, st.sampled_from((b"\n", b"\r\n", b"\n\n")), st.booleans(), CONTENTS)
def test_any_jsonl(lines: list[bytes], end: bytes, mark: bool, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        text = (b"\xef\xbb\xbf" if mark else b"") + end.join([dumped({"file_name": "best.png", "text": "the best"}), *lines])
        files = {"best.png": GOOD["PNG"], "a.png": GOOD["JPEG"], "b.png": content, "sub/c.png": GOOD["PNG L"], "a.txt": b"x"}
        there = write(root, {**files, "metadata.jsonl": text})
        manifest, table = validate(FolderSource(kind="folder", root=str(root), splits={"train": "."}), Path(folder) / "x", workers=1)
        rows = manifest.splits["train"]
        numbers = [n for n, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").splitlines(), 1) if line.strip()]
        refused = {row for row in table.row if row.startswith("line ")}
        kept = table[table.reason.str.contains("the row is kept")].row
        assert len(numbers) == len(rows) + len(refused - set(kept)), (table.to_dict("records"), rows)
        accounted = {row.file for row in rows} | set(table.file) | {"metadata.jsonl"}
        named = {PurePosixPath(f).as_posix().replace("sub/../", "") for f in accounted}
        assert [name for name in there if name not in accounted | named] == []
        whole(manifest, table, Path(folder))


def changed(good: dict[str, Any]) -> st.SearchStrategy[Any]:
    """The object with one or two of its values exchanged or left out, or anything else."""
    values = st.dictionaries(st.sampled_from(sorted(good)), JSON | st.just("gone"), max_size=2)
    return values.map(lambda some: {k: v for k, v in {**good, **some}.items() if not (isinstance(v, str) and v == "gone")}) | JSON


IMAGE = {"id": 1, "file_name": "a.png", "width": 12, "height": 9}
CAPTION = {"id": 1, "image_id": 1, "caption": "a fox"}
INSTANCE = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [1, 1, 5, 5], "segmentation": [[1, 1, 6, 1, 6, 6]]}
NUMBER = st.floats(-5, 15) | st.integers(-5, 15) | JSON
POLYGONS = st.lists(st.lists(NUMBER, max_size=9), max_size=3)
RUNS = st.fixed_dictionaries(
    {"size": st.just([9, 12]) | JSON, "counts": st.text(max_size=9) | st.lists(st.integers(-2, 60), max_size=6) | st.just([10, 98]) | JSON}
)
MASKS = st.builds(
    lambda mask, more: {**INSTANCE, "segmentation": mask, **more}, POLYGONS | RUNS | JSON, st.just({}) | st.just({"iscrowd": 1})
)


@ANY
@given(
    st.lists(changed(IMAGE), max_size=4),
    st.lists(changed(CAPTION), max_size=4),
    st.lists(changed(INSTANCE) | MASKS, max_size=4),
    st.sampled_from(sorted(GOOD)),
)
def test_any_coco(images: list[Any], captions: list[Any], instances: list[Any], kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        best = {"id": 77, "file_name": "best.png", "width": 12, "height": 9}
        content = {"images": [best, *images], "annotations": [{"image_id": 77, "caption": "the best"}, *captions]}
        files = {"a/a.png": GOOD[kind], "a/best.png": GOOD["PNG"], "annotations/captions_a.json": dumped(content)}
        write(root, {**files, "annotations/instances_a.json": dumped({"images": [], "annotations": instances})})
        manifest, table = validate(CocoSource(kind="coco", root=str(root), splits={"train": "a"}), Path(folder) / "x", workers=1)
        rows = manifest.splits["train"]
        refused = table[table.row.str.startswith("image") & ~table.reason.str.contains("the row is kept")]
        assert len(images) + 1 == len(rows) + len(refused), (table.to_dict("records"), rows)
        whole(manifest, table, Path(folder))


@ANY
@given(st.binary(max_size=400) | spoilt(JSON.map(dumped)), st.booleans())
def test_any_annotation_file(content: bytes, captions: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        good = dumped({"images": [IMAGE], "annotations": [CAPTION]})
        files = {"captions_a": content if captions else good, "instances_a": good if captions else content}
        write(Path(folder) / "root", {f"annotations/{name}.json": value for name, value in files.items()})
        try:
            validate(CocoSource(kind="coco", root=f"{folder}/root", splits={"train": "a"}), Path(folder) / "x", workers=1)
        except UserError as error:
            assert "\n" not in str(error)


@ANY
@given(changed(INSTANCE) | MASKS | JSON, st.integers(1, 40), st.integers(1, 40))
def test_any_instance_is_judged_and_what_is_good_can_be_decoded(instance: Any, width: int, height: int) -> None:
    if instance_fault(instance, width, height) is None:
        assert decode_mask(instance["segmentation"], width, height).shape == (height, width) and int(instance["category_id"]) is not None


@settings(ANY, max_examples=600)
@given(st.binary(max_size=80) | spoilt(IMAGES))
def test_any_image_is_decoded_or_refused(content: bytes) -> None:
    try:
        assert decode_image(content).mode == "RGB"
    except BadFile as fault:
        assert str(fault).startswith("the image") and "\n" not in str(fault)


@ANY
@given(st.binary(max_size=60) | LINES.map(b"\n".join))
def test_any_pairs(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        file.write_bytes(content)
        try:
            read_preferences(file)
        except UserError as error:
            assert "\n" not in str(error)


@ANY
@given(spoilt(st.just(dumped({"root": ".", "splits": ["train"]}))) | JSON.map(dumped), JSON.map(dumped))
def test_any_manifest_and_index(head: bytes, rows: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("root.json", head), ("train.jsonl", rows), ("index.json", head), ("captions.json", rows)):
            (Path(folder) / name).write_bytes(content)
        for read in (read_manifest, LatentCache):
            try:
                read(Path(folder))
            except UserError as error:
                assert "run data_prep" in str(error)


@settings(ANY, max_examples=15)
@given(st.sampled_from(("dataset.json", "annotations/captions_train.json", "annotations/instances_test.json")), st.binary(max_size=30))
def test_any_damage_of_the_embedded_data_is_mended(name: str, content: bytes) -> None:
    config = TwemojiConfig(train=2, val=1, test=1, test_unseen=1)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), config)
        before = {path.name: path.read_bytes() for path in Path(folder).rglob("*.*")}
        (Path(folder) / name).write_bytes(content)
        write_dataset(Path(folder), config)
        assert {path.name: path.read_bytes() for path in Path(folder).rglob("*.*")} == before
