"""Readers and row validation: every kind of bad row is named, and the good ones get through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pydantic import ValidationError

from hypersd_pipeline.data.coco import mask_fault
from hypersd_pipeline.data.config import CocoSource, DataConfig, FolderSource
from hypersd_pipeline.data.images import decode_image, fit
from hypersd_pipeline.data.rows import read_manifest, share_of, write_manifest
from hypersd_pipeline.data.twemoji import TwemojiConfig, write_dataset
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError


def write_image(path: Path, size: tuple[int, int] = (24, 16), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *path.name.encode()]).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


class Coco:
    """A COCO2017-shaped folder with one split, built row by row."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: list[Any] = []
        self.captions: list[Any] = []
        self.instances: list[Any] = []

    def add(
        self, image_id: int, *captions: Any, name: Any = None, write: bool = True, size: tuple[int, int] = (24, 16), **stated: Any
    ) -> None:
        name = f"{image_id:012d}.png" if name is None else name
        if write:
            write_image(self.root / "train2017" / name, size)
        self.images.append({"id": image_id, "file_name": name, "width": size[0], "height": size[1], **stated})
        self.captions += [{"id": len(self.captions), "image_id": image_id, "caption": c} for c in captions]

    def mask(self, image_id: int, segmentation: Any, **extra: Any) -> None:
        self.instances.append({"id": len(self.instances), "image_id": image_id, "category_id": 1, "segmentation": segmentation, **extra})

    def validate(self):
        folder = self.root / "annotations"
        folder.mkdir(parents=True, exist_ok=True)
        for kind, rows in (("captions", self.captions), ("instances", self.instances)):
            (folder / f"{kind}_train2017.json").write_text(json.dumps({"images": self.images, "annotations": rows}))
        return validate(CocoSource(kind="coco", root=str(self.root), splits={"train": "train2017"}), Path("unused"), workers=2)


INSIDE = [[1, 1, 20, 1, 20, 12, 1, 12]]


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    made = Coco(tmp_path / "coco")
    made.add(1, "a cat", "two cats")
    made.mask(1, INSIDE, bbox=[1, 1, 19, 11])
    return made


def compressed(width: int, height: int) -> dict[str, Any]:
    mask = np.zeros((height, width), np.uint8)
    mask[2:9, 3:11] = 1
    mask[12:, -2:] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [height, width], "counts": rle["counts"].decode()}


def bad_missing(c: Coco) -> None:
    c.add(2, "gone", write=False)


def bad_unreadable(c: Coco) -> None:
    c.add(2, "text, no image", write=False)
    (c.root / "train2017/000000000002.png").write_text("not an image")


def bad_truncated(c: Coco) -> None:
    c.add(2, "cut", size=(200, 200))
    path = c.root / "train2017/000000000002.png"
    path.write_bytes(path.read_bytes()[:5000])


def bad_zero_bytes(c: Coco) -> None:
    c.add(2, "nothing", write=False)
    (c.root / "train2017/000000000002.png").touch()


BAD_ROWS = {
    "missing": (bad_missing, "the file is missing"),
    "unreadable": (bad_unreadable, "the image cannot be read (no known image format)"),
    "truncated": (bad_truncated, "the image cannot be read"),
    "zero bytes": (bad_zero_bytes, "zero bytes"),
    "empty caption": (lambda c: c.add(2, "  \n"), "the caption is empty"),
    "no caption": (lambda c: c.add(2), "there is no caption"),
    "caption of another type": (lambda c: c.add(2, 7, None), "the caption is empty"),
    "duplicate id": (lambda c: c.add(1, "again", name="other.png"), "duplicate id 1 (first at image 1)"),
    "stated zero size": (lambda c: c.add(2, "x", width=0), "stated size is zero"),
    "another size": (lambda c: c.add(2, "x", width=48), "the image is 24x16, but 48x16 is stated"),
    "parent folder": (lambda c: c.add(2, "x", name="../secret.png"), "leads out of the images' folder"),
    "parent folder, backslash": (lambda c: c.add(2, "x", name="..\\secret.png", write=False), "leads out of the images' folder"),
    "absolute path": (lambda c: c.add(2, "x", name="/etc/hostname", write=False), "leads out of the images' folder"),
    "drive": (lambda c: c.add(2, "x", name="C:\\x.png", write=False), "leads out of the images' folder"),
    "no name": (lambda c: c.add(2, "x", name=5, write=False), "the row names no file"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_reported_and_the_good_one_kept(coco: Coco, case: str) -> None:
    spoil, reason = BAD_ROWS[case]
    spoil(coco)
    manifest, table = coco.validate()
    assert [row.image_id for row in manifest.splits["train"]] == ["1"]
    assert list(table.columns) == ["file", "row", "split", "reason"]
    assert len(table) == 1 and reason in table.reason[0] and table.split[0] == "train" and table.row[0].startswith("image ")


BAD_MASKS = {
    "polygon outside": ([[1, 1, 30, 1, 30, 12]], "polygon is outside the 24x16 image"),
    "polygon with an odd number": ([[1, 1, 20, 1, 20]], "not a list of three or more"),
    "polygon with nan": ([[1, 1, float("nan"), 1, 20, 3]], "outside the 24x16 image"),
    "no mask": ([], "has no mask"),
    "RLE of another size": ({"size": [24, 16], "counts": [384]}, "RLE size is [24, 16]"),
    "RLE too long": ({"size": [16, 24], "counts": [300, 100]}, "covers 400 pixels, the image has 384"),
    "RLE negative": ({"size": [16, 24], "counts": [400, -16]}, "cannot be read"),
    "RLE empty": ({"size": [16, 24], "counts": [384]}, "a mask is empty"),
    "compressed RLE of another image": ({**compressed(48, 16), "size": [16, 24]}, "covers 768 pixels"),
    "compressed RLE cut": ({"size": [16, 24], "counts": compressed(24, 16)["counts"][:-1] + "h"}, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
def test_a_mask_outside_its_image_is_reported(coco: Coco, case: str) -> None:
    segmentation, reason = BAD_MASKS[case]
    coco.add(2, "a dog")
    coco.mask(2, segmentation)
    manifest, table = coco.validate()
    assert [row.image_id for row in manifest.splits["train"]] == ["1"]
    assert len(table) == 1 and reason in table.reason[0]


def test_a_box_outside_its_image_is_reported(coco: Coco) -> None:
    coco.add(2, "a dog")
    coco.mask(2, INSIDE, bbox=[10, 1, 19, 11])
    assert "the box [10, 1, 19, 11] is outside" in coco.validate()[1].reason[0]


def test_good_masks_of_all_kinds(coco: Coco) -> None:
    crowd = {"size": [16, 24], "counts": [10, 30, 344]}
    coco.mask(1, crowd, iscrowd=1)
    coco.mask(1, compressed(24, 16))
    manifest, table = coco.validate()
    row = manifest.splits["train"][0]
    assert table.empty and row.n_instances == 3 and row.captions == ("a cat", "two cats") and (row.width, row.height) == (24, 16)


@pytest.mark.parametrize("seed", range(5))
def test_compressed_masks_are_read_as_pycocotools_writes_them(seed: int) -> None:
    height, width = 37, 53
    mask = (np.random.default_rng(seed).random((height, width)) < [0.5, 0.01, 0.99, 0.1, 0.9][seed]).astype(np.uint8)
    rle = coco_mask.encode(np.asfortranarray(mask))
    instance = {"segmentation": {"size": [height, width], "counts": rle["counts"].decode()}}
    assert mask_fault(instance, width, height) is None
    assert "RLE size" in mask_fault(instance, height, width)


def test_an_empty_caption_among_others_is_reported_alone(coco: Coco) -> None:
    coco.add(2, "a dog", "", "a brown dog")
    manifest, table = coco.validate()
    assert manifest.splits["train"][1].captions == ("a dog", "a brown dog")
    assert len(table) == 1 and "1 of 3 captions are empty" in table.reason[0]


def test_captions_of_unknown_images_are_reported(coco: Coco) -> None:
    coco.captions.append({"image_id": 99, "caption": "nobody"})
    manifest, table = coco.validate()
    assert len(manifest.splits["train"]) == 1
    assert table.row[0] == "annotations[2]" and "99" in table.reason[0]


def test_no_good_row_is_an_error(tmp_path: Path) -> None:
    coco = Coco(tmp_path)
    coco.add(1, "gone", write=False)
    with pytest.raises(UserError, match=r"no good row, 1 bad ones .*the file is missing"):
        coco.validate()


@pytest.mark.parametrize(("content", "message"), [(None, "is missing"), ("{", "is not valid JSON"), ("[]", "has no lists 'images'")])
def test_unusable_annotation_files(coco: Coco, content: str | None, message: str) -> None:
    coco.validate()
    file = coco.root / "annotations/captions_train2017.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(UserError, match=message):
        validate(CocoSource(kind="coco", root=str(coco.root), splits={"train": "train2017"}), Path("unused"))


def folder(root: Path, **extra: Any):
    return validate(FolderSource(kind="folder", root=str(root), **extra), Path("unused"), workers=2)


def test_folder_with_text_files(tmp_path: Path) -> None:
    for name in ("train/a.png", "train/sub/b.JPG", "train/c.png", "train/d.png", "val/e.png"):
        write_image(tmp_path / name)
    (tmp_path / "train/a.txt").write_text("a fox\n\na red fox\n")
    (tmp_path / "train/sub/b.txt").write_text("an owl", encoding="utf-8-sig")
    (tmp_path / "train/d.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "val/e.txt").write_text("a bee")
    manifest, table = folder(tmp_path)
    assert [(row.file, row.captions) for row in manifest.splits["train"]] == [
        ("train/a.png", ("a fox", "a red fox")),
        ("train/sub/b.JPG", ("an owl",)),
    ]
    assert [row.file for row in manifest.splits["val"]] == ["val/e.png"]
    assert dict(zip(table.file, table.reason, strict=True)) == {
        "train/c.png": "there is no caption file c.txt",
        "train/d.png": "the caption file d.txt is UTF-16, not UTF-8; save it as UTF-8",
    }


def test_folder_with_jsonl(tmp_path: Path) -> None:
    for name in "abc":
        write_image(tmp_path / f"{name}.png")
    lines = [{"file_name": "a.png", "text": "a fox"}, {"file": "b.png", "captions": ["an owl", "a bird"]}, "oops", {"caption": "lost"}]
    lines += [{"file_name": "a.png", "text": "again"}, {"file_name": "../x.png", "text": "out"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n")
    manifest, table = folder(tmp_path, splits={"train": "."})
    assert [row.captions for row in manifest.splits["train"]] == [("a fox",), ("an owl", "a bird")]
    reasons = dict(zip(table.row, table.reason, strict=True))
    assert reasons["line 3"] == reasons["line 7"] == "the line is no JSON object"
    assert reasons["line 4"] == "the row names no file" and "leads out" in reasons["line 6"]
    assert reasons["line 5"] == "duplicate id a.png (first at line 1)" and len(reasons) == 6
    assert reasons["c.png"] == "no line of metadata.jsonl names the image"


def test_several_jsonl_files_must_be_told_apart(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text('{"file_name": "a.png", "text": "a fox"}\n')
    with pytest.raises(UserError, match=r"one.jsonl, two.jsonl.*data.source.captions"):
        folder(tmp_path)
    assert len(folder(tmp_path, captions="two.jsonl", splits={"train": "."})[0].splits["train"]) == 1


def test_a_folder_without_splits_is_split_by_hash(tmp_path: Path) -> None:
    for i in range(60):
        write_image(tmp_path / f"{i:03d}.png", (2, 2))
        (tmp_path / f"{i:03d}.txt").write_text(f"number {i}")
    splits = {"train": {"share": [0, 0.7]}, "test": {"share": [0.7, 1]}}
    first = {name: {r.image_id for r in rows} for name, rows in folder(tmp_path, splits=splits)[0].splits.items()}
    assert len(first["train"]) + len(first["test"]) == 60 and not first["train"] & first["test"]
    assert all(share_of(i) >= 0.7 for i in first["test"]) and 8 <= len(first["test"]) <= 28
    write_image(tmp_path / "new.png", (2, 2))
    (tmp_path / "new.txt").write_text("new")
    second = {name: {r.image_id for r in rows} for name, rows in folder(tmp_path, splits=splits)[0].splits.items()}
    assert all(first[name] <= second[name] for name in first), "an image changed its split because another one came"
    assert set(folder(tmp_path)[0].splits) == {"train", "val", "test"}


def test_the_same_image_in_two_splits_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "test"):
        for name in ("same", f"only in {split}"):
            write_image(tmp_path / split / f"{name}.png")
            (tmp_path / split / f"{name}.txt").write_text("a fox")
    folder(tmp_path)
    assert "1 images are, byte for byte, in more than one split" in caplog.text


def test_the_manifest_survives_a_move_and_its_key_follows_the_content(tmp_path: Path) -> None:
    project = tmp_path / "project"
    write_image(project / "dataset/train/a.png")
    (project / "dataset/train/a.txt").write_text("a fox")
    manifest = folder(project / "dataset")[0]
    write_manifest(project / "manifest", manifest)
    project.rename(tmp_path / "moved")
    read = read_manifest(tmp_path / "moved/manifest")
    assert read.splits == manifest.splits and read.key == manifest.key
    assert read.path(read.splits["train"][0]) == tmp_path / "moved/dataset/train/a.png"
    write_image(tmp_path / "moved/dataset/train/a.png", seed=1)
    assert folder(tmp_path / "moved/dataset")[0].key != manifest.key, "other pixels, same key"
    (tmp_path / "moved/manifest/train.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"damaged.*run data_prep again"):
        read_manifest(tmp_path / "moved/manifest")
    with pytest.raises(UserError, match="run data_prep first"):
        read_manifest(tmp_path / "nowhere")


def test_the_embedded_scenes_are_all_good(tmp_path: Path) -> None:
    source = DataConfig(source={"kind": "twemoji", "train": 6, "val": 2, "test": 3, "test_unseen": 2}).source
    write_dataset(tmp_path, TwemojiConfig(train=6, val=2, test=3, test_unseen=2))
    manifest, table = validate(source, tmp_path)
    assert table.empty and {name: len(rows) for name, rows in manifest.splits.items()} == {
        "train": 6,
        "val": 2,
        "test": 3,
        "test_unseen": 2,
    }
    assert all(1 <= row.n_instances <= 3 for rows in manifest.splits.values() for row in rows)


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "coco"},
        {"kind": "folder", "root": "x", "train": 5},
        {"kind": "video", "root": "x"},
        {"kind": "folder", "root": "x", "splits": {"train": {"share": [0.5, 0.5]}}},
    ],
)
def test_bad_sources_are_refused(source: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(source=source)


def test_images_are_brought_to_size(tmp_path: Path) -> None:
    import io

    wide = Image.new("RGB", (80, 40), "red")
    wide.paste("blue", (0, 0, 20, 40))  # the left quarter is what the centre crop cuts off
    pixels, crop = fit(wide, 20)
    assert pixels.shape == (20, 20, 3) and crop == (0, 10) and (pixels[:, 2:] == [255, 0, 0]).all()
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    small, _ = fit(Image.fromarray(checks.astype(np.uint8)).convert("RGB"), 16)
    assert np.abs(small.astype(int) - 127).max() < 12, "downsizing without antialiasing"
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(buffer, "PNG")
    assert (np.asarray(decode_image(buffer.getvalue())) == 255).all(), "transparency is white"
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a camera
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue()).size == (4, 8)
