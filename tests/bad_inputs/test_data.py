"""One fault at a time in otherwise good data: it is rejected by file and reason, or refused in one sentence, and nothing else happens."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydantic import ValidationError

from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.images import load_image
from hypersd_pipeline.data.preferences import read_preferences
from hypersd_pipeline.data.rows import Manifest, read_manifest, write_manifest
from hypersd_pipeline.data.twemoji import TwemojiConfig, write_dataset
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError

DEEP = "[" * 10_000 + "]" * 10_000
SURROGATE = '"\\ud800"'


def write_image(path: Path, size: tuple[int, int] = (24, 16), kind: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([*str(path.name).encode(), *size]).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, kind)


def one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and "; " in text and "Traceback" not in text and len(text) < 1500


class Outcome:
    """What the validation of a source gave."""

    def __init__(self, source: dict[str, Any], dataset: Path, complete: bool = True) -> None:
        self.error, self.rows, self.table = "", {}, pd.DataFrame(columns=["file", "row", "split", "reason"])
        try:
            manifest, self.table = validate(DataConfig(source=source).source, dataset, workers=2, complete=complete)
        except ValidationError as error:  # the command line makes a sentence of it
            self.error = str(error)
            return
        except UserError as error:
            self.error = str(error)
            assert one_sentence(self.error), self.error
            return
        self.rows = {name: [row.file for row in rows] for name, rows in manifest.splits.items()}
        write_manifest(dataset.parent / "manifest", manifest)
        assert read_manifest(dataset.parent / "manifest").key == manifest.key
        self.table.to_csv(dataset.parent / "rejected.csv")

    def reasons(self, file: str) -> list[str]:
        return self.table[self.table.file == file].reason.tolist()


# --- a folder with .txt files ------------------------------------------------------------------------------------------------------------


class Folder:
    """Four training and five test images with captions beside them."""

    def __init__(self, root: Path) -> None:
        self.root = root / "images"
        for split, count in (("train", 4), ("test", 5)):
            for i in range(count):
                self.add(f"{split}/{i}.png", f"image {i} of {split}")
        self.source: dict[str, Any] = {"kind": "folder", "root": str(self.root)}

    def add(self, name: str, caption: str | bytes | None = "a caption", kind: str | None = None, size: tuple[int, int] = (24, 16)) -> None:
        write_image(self.root / name, size, kind)
        if caption is not None:
            side = (self.root / name).with_suffix(".txt")
            side.write_bytes(caption.encode() if isinstance(caption, str) else caption)

    def write(self, name: str, content: str | bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def outside(self) -> Path:
        """A good image and a good caption beside the root."""
        write_image(self.root.parent / "secret.png")
        (self.root.parent / "secret.txt").write_text("a secret")
        return self.root.parent / "secret"


def fifo(f: Folder, name: str) -> None:
    os.mkfifo(f.root / name)


def bound_socket(f: Folder, name: str) -> None:
    here = os.getcwd()
    os.chdir((f.root / name).parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(Path(name).name)
    finally:
        os.chdir(here)


def link(f: Folder, name: str, target: Path | str) -> None:
    (f.root / name).unlink(missing_ok=True)
    (f.root / name).symlink_to(target)


def not_utf8_name(f: Folder, suffix: bytes) -> None:
    shutil.copy(f.root / "train/0.png", os.fsdecode(os.fsencode(f.root / "train") + b"/\xff" + suffix))


# name -> what is done, the file in the table, the reason there
REJECTED: dict[str, tuple[Callable[[Folder], Any], str, str]] = {
    "no caption file": (lambda f: f.add("train/x.png", None), "train/x.png", "there is no caption file x.txt"),
    "an empty caption": (lambda f: f.add("train/x.png", ""), "train/x.png", "the caption is empty"),
    "a blank caption": (lambda f: f.add("train/x.png", "\n \n\t"), "train/x.png", "the caption is empty"),
    "UTF-16 little": (lambda f: f.add("train/x.png", "é".encode("utf-16")), "train/x.png", "is UTF-16, not UTF-8; save it as UTF-8"),
    "UTF-16 big": (lambda f: f.add("train/x.png", b"\xfe\xff\0a"), "train/x.png", "x.txt is UTF-16, not UTF-8"),
    "UTF-16 without mark": (lambda f: f.add("train/x.png", "fox".encode("utf-16-le")), "train/x.png", "UTF-16 without a byte order mark"),
    "UTF-32": (lambda f: f.add("train/x.png", "fox".encode("utf-32")), "train/x.png", "is UTF-32, not UTF-8"),
    "Latin-1": (lambda f: f.add("train/x.png", "caf\xe9".encode("latin-1")), "train/x.png", "not UTF-8 text but perhaps Latin-1"),
    "a caption that is a PNG": (lambda f: f.add("train/x.png", b"\x89PNG\r\n\0\0"), "train/x.png", "no text at all"),
    "a huge caption": (lambda f: f.add("train/x.png", "a" * 2**21), "train/x.png", "has 2097152 bytes, 1048576 at most are read"),
    "a caption that is a pipe": (lambda f: (f.add("train/x.png", None), fifo(f, "train/x.txt")), "train/x.png", "a named pipe"),
    "a caption that is a folder": (
        lambda f: (f.add("train/x.png", None), (f.root / "train/x.txt").mkdir()),
        "train/x.png",
        "no regular file but a folder",
    ),
    "a caption that is a socket": (lambda f: (f.add("train/x.png", None), bound_socket(f, "train/x.txt")), "train/x.png", "a socket"),
    "a caption linked out": (
        lambda f: (f.add("train/x.png", None), link(f, "train/x.txt", f.outside().with_suffix(".txt"))),
        "train/x.png",
        "a link that leads out of the root",
    ),
    "a caption linked to /dev/zero": (
        lambda f: (f.add("train/x.png", None), link(f, "train/x.txt", "/dev/zero")),
        "train/x.png",
        "a link that leads out",
    ),
    "a caption linked to itself": (
        lambda f: (f.add("train/x.png", None), link(f, "train/x.txt", "x.txt")),
        "train/x.png",
        "cannot be opened (Too many levels",
    ),
    "a caption linked to nothing": (
        lambda f: (f.add("train/x.png", None), link(f, "train/x.txt", "gone.txt")),
        "train/x.png",
        "the file is missing",
    ),
    "an image that is a pipe": (lambda f: (f.write("train/x.txt", "x"), fifo(f, "train/x.png")), "train/x.png", "a named pipe"),
    "an image that is a socket": (lambda f: (f.write("train/x.txt", "x"), bound_socket(f, "train/x.png")), "train/x.png", "a socket"),
    "an image that is a folder": (
        lambda f: (f.write("train/x.txt", "x"), (f.root / "train/x.png").mkdir()),
        "train/x.png",
        "no regular file but a folder",
    ),
    "an image linked out": (
        lambda f: (f.write("train/x.txt", "x"), link(f, "train/x.png", f.outside().with_suffix(".png"))),
        "train/x.png",
        "a link that leads out of the root; copy it",
    ),
    "an image linked to a device": (lambda f: (f.write("train/x.txt", "x"), link(f, "train/x.png", "/dev/zero")), "train/x.png", "a link"),
    "an image linked to nothing": (lambda f: (f.write("train/x.txt", "x"), link(f, "train/x.png", "y.png")), "train/x.png", "is missing"),
    "a linked folder": (
        lambda f: (write_image(f.root.parent / "more/y.png"), link(f, "train/more", f.root.parent / "more")),
        "train/more",
        "a link to a folder, which is not followed",
    ),
    "a file of a gigabyte": (
        lambda f: (f.add("train/x.png"), os.truncate(f.root / "train/x.png", 2**30)),
        "train/x.png",
        "has 1073741824 bytes, 268435456 at most",
    ),
    "an empty image": (lambda f: (f.add("train/x.png"), f.write("train/x.png", b"")), "train/x.png", "zero bytes"),
    "text in an image": (lambda f: (f.add("train/x.png"), f.write("train/x.png", "text")), "train/x.png", "no known image format"),
    "half an image": (
        lambda f: (f.add("train/x.png", size=(90, 90)), os.truncate(f.root / "train/x.png", 4000)),
        "train/x.png",
        "the image cannot be read (",
    ),
    "EPS in a .png": (lambda f: (f.add("train/x.png"), f.write("train/x.png", "%!PS-Adobe-3.0 EPSF-3.0\n")), "train/x.png", "image is EPS"),
    "PDF in a .jpg": (lambda f: (f.write("train/x.txt", "x"), f.write("train/x.jpg", "%PDF-1.4\n")), "train/x.jpg", "the image is PDF"),
    "GIF in a .png": (lambda f: f.add("train/x.png", kind="GIF"), "train/x.png", "the image is GIF, which is not read"),
    "a panorama": (lambda f: f.add("train/x.png", size=(330, 20)), "train/x.png", "330x20, so one side is more than 16 times"),
    "a .gif": (lambda f: f.add("train/x.gif"), "train/x.gif", ".gif files are not read; convert it"),
    "a .tiff": (lambda f: f.add("train/x.tiff"), "train/x.tiff", ".tiff files are not read"),
    "a .TIF": (lambda f: f.add("train/x.TIF", kind="TIFF"), "train/x.TIF", ".tif files are not read"),
    "an .avif": (lambda f: f.write("train/x.avif", "x"), "train/x.avif", ".avif files are not read"),
    "a .heic": (lambda f: f.write("train/x.heic", "x"), "train/x.heic", ".heic files are not read"),
    "an .svg": (lambda f: f.write("train/x.svg", "x"), "train/x.svg", ".svg files are not read"),
    "a caption of a .gif": (lambda f: f.add("train/x.gif"), "train/x.txt", "its image is not used"),
    "a caption alone": (lambda f: f.write("train/x.txt", "a fox"), "train/x.txt", "there is no image beside this caption file"),
    "a caption in capitals": (lambda f: f.write("train/x.TXT", "a fox"), "train/x.TXT", "there is no image beside"),
    "a stranger": (lambda f: f.write("train/Thumbs.db", "x"), "train/Thumbs.db", "it is no image and no caption file"),
    "a file without suffix": (lambda f: f.write("train/deep/README", "x"), "train/deep/README", "it is no image and no caption file"),
    "a table": (lambda f: f.write("train/metadata.csv", "x"), "train/metadata.csv", "it is no image and no caption file"),
    "a pipe of another name": (lambda f: fifo(f, "train/pipe"), "train/pipe", "it is no image and no caption file"),
    "a name that is not UTF-8": (lambda f: not_utf8_name(f, b".png"), "train/\\udcff.png", "the file name is no valid UTF-8"),
    "a stranger's name that is not UTF-8": (lambda f: not_utf8_name(f, b".doc"), "train/\\udcff.doc", "the file name is no valid UTF-8"),
    "an image beside the splits": (lambda f: f.add("x.png"), "x.png", "the file is in no split (test, train)"),
    "a folder beside the splits": (lambda f: f.add("more/x.png"), "more", "no split (test, train); its 2 files are not used"),
    "a damaged profile": (
        lambda f: Image.new("RGB", (9, 9)).save(f.root / "train/0.png", icc_profile=b"none"),
        "train/0.png",
        "ICC profile cannot be read",
    ),
    "an animation": (
        lambda f: Image.new("RGB", (9, 9)).save(f.root / "train/0.png", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]),
        "train/0.png",
        "an animation of 2 frames",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_a_bad_file_of_a_folder_is_rejected(tmp_path: Path, name: str) -> None:
    spoil, file, reason = REJECTED[name]
    world = Folder(tmp_path)
    spoil(world)
    outcome = Outcome(world.source, tmp_path / "project/data/dataset")
    assert not outcome.error, outcome.error
    found = outcome.reasons(file)
    assert len(found) == 1 and reason in found[0], outcome.table.to_dict("records")
    good = {f"train/{i}.png" for i in range(4)} - {file}
    assert set(outcome.rows["train"]) == good and len(outcome.rows["test"]) == 5


def shares(**splits: Any) -> dict[str, Any]:
    return {"splits": splits}


def only_folder(f: Folder, count: int) -> None:
    shutil.rmtree(f.root)
    for i in range(count):
        f.add(f"{i}.png", f"image {i}")


def same_files(f: Folder) -> None:
    shutil.rmtree(f.root / "test")
    shutil.copytree(f.root / "train", f.root / "test")


# name -> what is done, what the sentence says
REFUSED: dict[str, tuple[Callable[[Folder], Any], str]] = {
    "no root": (lambda f: f.source.update(root=str(f.root / "none")), "none is not a folder; give the folder that holds the images"),
    "a root that is a file": (lambda f: f.source.update(root=str(f.root / "train/0.png")), "0.png is not a folder"),
    "an empty root": (lambda f: f.source.update(root=""), "data.source|source.folder.root\n.*is empty"),
    "a blank root": (lambda f: f.source.update(root="  "), "is empty or no path"),
    "a root with a zero byte": (lambda f: f.source.update(root="a\0b"), "is empty or no path"),
    "a root of nobody": (lambda f: f.source.update(root="~nobody_of_this_name/x"), "is not a folder"),
    "a root with a long name": (lambda f: f.source.update(root="/" + "x" * 5000), "is not a folder"),
    "a root above the project": (lambda f: f.source.update(root=str(f.root.parent)), "is the project's own folder or lies above it"),
    "the root of the system": (lambda f: f.source.update(root="/"), "is the project's own folder or lies above it"),
    "the project": (
        lambda f: (f.write("pyproject.toml", ""), (f.root / "conf/base").mkdir(parents=True)),
        "is the project's own folder",
    ),
    "no test": (lambda f: shutil.rmtree(f.root / "test"), "there is no split 'test' but train; add a subfolder test"),
    "no train": (lambda f: shutil.rmtree(f.root / "train"), "has test but no subfolder train; add it"),
    "no train in the splits": (lambda f: f.source.update(shares(test="test")), "no split 'train' but test"),
    "neither": (lambda f: f.source.update(shares(val="train")), "no split 'train' and no split 'test' but val"),
    "no splits": (lambda f: f.source.update(splits={}), "no split 'train' and no split 'test'"),
    "few test rows": (
        lambda f: [(f.root / f"test/{i}{s}").unlink() for i in range(2) for s in (".png", ".txt")],
        "the split 'test' has 3 rows, 4 at least are needed; add images to 'test'",
    ),
    "few good test rows": (
        lambda f: [f.write(f"test/{i}.png", "") for i in range(2)],
        "the split 'test' has 3 rows, 4 at least are needed; add images to 'test'",
    ),
    "forty images in one folder": (
        lambda f: only_folder(f, 40),
        r"the split 'test' has [0-3] rows, 4 at least are needed; set data.source.splits: \{train: \{share: \[0, 0.\d\]\}, test: ",
    ),
    "five images in one folder": (lambda f: only_folder(f, 5), r"the split 'test' has \d rows, 4 at least are needed; add images\."),
    "nothing in the folder": (lambda f: only_folder(f, 0) or f.root.mkdir(), "the split 'train' has 0 rows"),
    "no good row": (lambda f: [f.write(f"train/{i}.txt", "") for i in range(4)], r"'train' has no good row, 4 bad ones \(first: train"),
    "train is test": (lambda f: f.source.update(shares(train="train", test="train")), "train and test both take the share"),
    "train is test, written otherwise": (lambda f: f.source.update(shares(train="train", test="./train/")), "both take the share"),
    "shares that overlap": (
        lambda f: f.source.update(shares(train={"of": "train", "share": [0, 0.9]}, test={"of": "train", "share": [0.8, 1]})),
        r"train and test both take the share \[0.8, 0.9\] of 'train'",
    ),
    "train holds test": (lambda f: f.source.update(shares(train=".", test="test")), "train and test have 5 images in common"),
    "test is a copy of train": (same_files, "every image of the split 'test' is, byte for byte, in 'train'"),
    "a split of another place": (lambda f: f.source.update(shares(train="../images/train", test="test")), "leads out of root"),
    "an absolute split": (lambda f: f.source.update(shares(train=str(f.root / "train"), test="test")), "leads out of root"),
    "a split of a drive": (lambda f: f.source.update(shares(train="C:\\train", test="test")), "leads out of root"),
    "a split's name that is a path": (lambda f: f.source.update(splits={"../../x": "test", "train": "train"}), "is no name of a file"),
    "a split's name that is hidden": (lambda f: f.source.update(splits={".x": "test", "train": "train"}), "is no name of a file"),
    "a split's name that is empty": (lambda f: f.source.update(splits={"": "test", "train": "train"}), "is no name of a file"),
    "a split's name with a slash": (lambda f: f.source.update(splits={"a/b": "test", "train": "train"}), "is no name of a file"),
    "a split that is missing": (lambda f: f.source.update(shares(train="train", test="none")), "none is missing; check root and splits"),
    "a split linked out": (
        lambda f: (shutil.move(f.root / "test", f.root.parent / "elsewhere"), link(f, "test", f.root.parent / "elsewhere")),
        "test is a link that leads out of",
    ),
    "captions of another place": (lambda f: f.source.update(captions="../../.."), "leads out of root"),
    "captions of the system": (lambda f: f.source.update(captions="/etc/passwd"), "leads out of root"),
    "captions that are missing": (lambda f: f.source.update(captions="x.jsonl"), "x.jsonl is missing; check data.source.captions"),
    "captions that are a folder": (
        lambda f: (f.source.update(captions="x"), (f.root / "train/x").mkdir(), (f.root / "test/x").mkdir()),
        "no regular file but a folder; mend it",
    ),
    "captions that are a pipe": (lambda f: fifo(f, "train/metadata.jsonl"), "metadata.jsonl: it is no regular file but a named pipe"),
    "captions linked out": (
        lambda f: link(f, "train/metadata.jsonl", f.outside().with_suffix(".txt")),
        "metadata.jsonl: the file is a link that leads out of the root",
    ),
    "captions in UTF-16": (
        lambda f: f.write("train/metadata.jsonl", '{"file_name": "0.png", "text": "x"}'.encode("utf-16")),
        "metadata.jsonl: the file is UTF-16, not UTF-8; save it as UTF-8",
    ),
    "two caption files": (
        lambda f: (f.write("train/a.jsonl", "{}"), f.write("train/b.jsonl", "{}")),
        "several caption files",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_folder_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    spoil, sentence = REFUSED[name]
    world = Folder(tmp_path)
    spoil(world)
    outcome = Outcome(world.source, tmp_path / "project/data/dataset")
    assert re.search(sentence, outcome.error), outcome.error or outcome.table.to_dict("records")


def test_the_split_that_is_proposed_works(tmp_path: Path) -> None:
    import yaml

    world = Folder(tmp_path)
    only_folder(world, 40)
    proposal = Outcome(world.source, tmp_path / "project/dataset").error.partition("data.source.splits: ")[2].removesuffix(".")
    outcome = Outcome({**world.source, "splits": yaml.safe_load(proposal)}, tmp_path / "project/dataset")
    assert not outcome.error and len(outcome.rows["test"]) >= 4 and len(outcome.rows["train"]) + len(outcome.rows["test"]) == 40


def test_what_is_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    world = Folder(tmp_path)
    world.add("train/a.jfif", "\ufeffwith a mark", kind="JPEG")
    world.add("train/b.JPG", "two\r\nlines", kind="JPEG")
    world.add("train/c.webp", "\u732b")
    world.add("train/d.bmp", "a")
    world.add("train/e.png", "another format inside", kind="JPEG")
    world.add("train/.hidden.png", None)
    world.add("train/.git/x.png", None)
    link(world, "train/f.png", "0.png")
    world.write("train/f.txt", "a link inside the root")
    manifest, table = validate(DataConfig(source=world.source).source, tmp_path / "dataset")
    assert table.empty, table.to_dict("records")
    captions = {row.file: row.captions for row in manifest.splits["train"]}
    assert captions["train/a.jfif"] == ("with a mark",) and captions["train/b.JPG"] == ("two", "lines") and len(captions) == 10
    assert captions["train/c.webp"] == ("\u732b",) and "2 hidden files or folders are not read" in caplog.text


# --- a folder with a .jsonl --------------------------------------------------------------------------------------------------------------

GOOD_LINE = {"file_name": "x.png", "text": "a fox"}
LINES: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "the line is no JSON object"),
    "a list": (b"[1]", "the line is no JSON object"),
    "a number": (b"5", "the line is no JSON object"),
    "nested deeply": (DEEP.encode(), "the line is no JSON object"),
    "nested deeply inside": (b'{"file_name": "x.png", "text": ' + DEEP.encode() + b"}", "the line is no JSON object"),
    "Latin-1": (b'{"file_name": "x.png", "text": "caf\xe9"}', "perhaps Latin-1"),
    "a zero byte": (b'{"file_name": "x.png", "text": "a\0"}', "UTF-16 without a byte order mark"),
    "no name": ({"text": "a fox"}, "the row names no file"),
    "a name that is a number": ({**GOOD_LINE, "file_name": 5}, "the row names no file"),
    "a name that is a list": ({**GOOD_LINE, "file_name": [[["x.png"]]]}, "the row names no file"),
    "a name that is null": ({**GOOD_LINE, "file_name": None}, "the row names no file"),
    "a blank name": ({**GOOD_LINE, "file_name": " "}, "the row names no file"),
    "a name outside": ({**GOOD_LINE, "file_name": "../test/0.png"}, "leads out of the images' folder"),
    "a name outside, hidden": ({**GOOD_LINE, "file_name": "a/../../test/0.png"}, "leads out of the images' folder"),
    "an absolute name": ({**GOOD_LINE, "file_name": "/etc/passwd"}, "leads out of the images' folder"),
    "a share of Windows": ({**GOOD_LINE, "file_name": "\\\\host\\x.png"}, "leads out of the images' folder"),
    "a name with a zero byte": ({**GOOD_LINE, "file_name": "x\0.png"}, "leads out of the images' folder"),
    "a name with a surrogate": (b'{"file_name": ' + SURROGATE.encode() + b', "text": "a fox"}', "the file name is no valid UTF-8"),
    "a very long name": ({**GOOD_LINE, "file_name": "x" * 3000}, "cannot be opened (File name too long)"),
    "a name of a folder": ({**GOOD_LINE, "file_name": "."}, "no regular file but a folder"),
    "a missing file": ({**GOOD_LINE, "file_name": "gone.png"}, "the file is missing"),
    "a file below a file": ({**GOOD_LINE, "file_name": "0.png/x.png"}, "the file is missing"),
    "no caption": ({"file_name": "x.png"}, "the caption is empty"),
    "a caption that is a number": ({**GOOD_LINE, "text": 5}, "the caption is empty"),
    "a caption that is an object": ({**GOOD_LINE, "text": {"a": 1}}, "the caption is empty"),
    "no captions": ({"file_name": "x.png", "captions": []}, "there is no caption"),
    "captions of other types": ({"file_name": "x.png", "captions": [None, 1, [], {}]}, "the caption is empty"),
    "a caption with a surrogate": (b'{"file_name": "x.png", "text": ' + SURROGATE.encode() + b"}", "a lone surrogate, which is no text"),
    "the same name again": ({**GOOD_LINE, "file_name": "0.png"}, "duplicate id 0.png (first at line 1)"),
    "the same file again": ({**GOOD_LINE, "file_name": "./0.png"}, "./0.png is the same file as 0.png (line 1)"),
    "one caption is empty": ({"file_name": "x.png", "captions": ["a", ""]}, "1 of 2 captions are empty; the row is kept"),
    "a huge line": ({**GOOD_LINE, "text": "a" * 2**20}, "the line has more than 1048576 bytes"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_bad_line_is_rejected(tmp_path: Path, name: str) -> None:
    line, reason = LINES[name]
    world = Folder(tmp_path)
    for split, count in (("train", 4), ("test", 5)):
        good = [json.dumps({"file_name": f"{i}.png", "text": f"image {i}"}).encode() for i in range(count)]
        bad = [line if isinstance(line, bytes) else json.dumps(line).encode()] if split == "train" else []
        world.write(f"{split}/metadata.jsonl", b"\xef\xbb\xbf" + b"\n".join([*good, *bad]))
        for side in (world.root / split).glob("*.txt"):
            side.unlink()
    world.add("train/x.png", None)
    outcome = Outcome(world.source, tmp_path / "project/dataset")
    assert not outcome.error, outcome.error
    found = outcome.table[outcome.table.row == "line 5"].reason.tolist()
    assert len(found) == 1 and reason in found[0], outcome.table.to_dict("records")
    assert [file for file in outcome.rows["train"] if file != "train/x.png"] == [f"train/{i}.png" for i in range(4)]
    assert len(outcome.table) == 1 or outcome.reasons("train/x.png") == ["no line of metadata.jsonl names the image"]


# --- COCO --------------------------------------------------------------------------------------------------------------------------------

POLYGON = [[1, 1, 20, 1, 20, 12, 1, 12]]


class Coco:
    """Six images in each of two splits, each with a caption and a mask."""

    def __init__(self, root: Path) -> None:
        self.root = root / "coco"
        self.source: dict[str, Any] = {"kind": "coco", "root": str(self.root), "splits": {"train": "a", "test": "b"}}
        self.images: list[Any] = []
        self.captions: list[Any] = []
        self.instances: list[Any] = []
        self.image, self.caption, self.instance = {}, {}, {}  # the ones to spoil
        for i in range(1, 7):
            write_image(self.root / f"a/{i}.png")
            write_image(self.root / f"b/{i}.png", (16, 24))
            self.image = {"id": i, "file_name": f"{i}.png", "width": 24, "height": 16}
            self.caption = {"id": i, "image_id": i, "caption": f"image {i}"}
            self.instance = {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 19, 11], "segmentation": POLYGON, "iscrowd": 0}
            self.images.append(self.image)
            self.captions.append(self.caption)
            self.instances.append(self.instance)
        good = {"images": [{**image, "width": 16, "height": 24} for image in self.images]}
        self.write("captions_b", json.dumps({**good, "annotations": self.captions}))
        self.write("instances_b", json.dumps({**good, "annotations": []}))
        self.raw: dict[str, str | bytes | None] = {}

    def write(self, name: str, content: str | bytes) -> None:
        path = self.root / f"annotations/{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def outcome(self) -> Outcome:
        for name, rows in (("captions_a", self.captions), ("instances_a", self.instances)):
            content = self.raw.get(name, json.dumps({"images": self.images, "annotations": rows}))
            if content is not None:
                self.write(name, content)
        return Outcome(self.source, self.root.parent / "project/dataset")


def setting(where: str, **values: Any) -> Callable[[Coco], Any]:
    return lambda c: getattr(c, where).update(values)


def without(where: str, key: str) -> Callable[[Coco], Any]:
    return lambda c: getattr(c, where).pop(key)


def appended(where: str, value: Any) -> Callable[[Coco], Any]:
    return lambda c: getattr(c, where).append(value)


def masked(segmentation: Any) -> Callable[[Coco], Any]:
    return setting("instance", segmentation=segmentation)


# name -> what is done, the row in the table, the reason there, and whether the sixth image is good nevertheless
BAD_COCO: dict[str, tuple[Callable[[Coco], Any], str, str, bool]] = {
    "an image that is a number": (appended("images", 5), "images[6]", "the image has no id", True),
    "an image that is null": (appended("images", None), "images[6]", "the image has no id", True),
    "an image without id": (appended("images", {"file_name": "6.png"}), "images[6]", "the image has no id", True),
    "an id that is a list": (appended("images", {"id": [1], "file_name": "6.png"}), "images[6]", "neither a whole number nor text", True),
    "an id that is true": (appended("images", {"id": True, "file_name": "6.png"}), "images[6]", "neither a whole number nor text", True),
    "an id of a half": (appended("images", {"id": 1.5, "file_name": "6.png"}), "images[6]", "neither a whole number nor text", True),
    "an id twice": (appended("images", {"id": 6, "file_name": "5.png"}), "image 6", "duplicate id 6 (first at image 6)", True),
    "an id twice in another type": (appended("images", {"id": "6", "file_name": "5.png"}), "image 6", "duplicate id 6", True),
    "an id twice as a float": (appended("images", {"id": 6.0, "file_name": "5.png"}), "image 6", "duplicate id 6", True),
    "no file name": (without("image", "file_name"), "image 6", "the row names no file", False),
    "a file name that is a list": (setting("image", file_name=["6.png"]), "image 6", "the row names no file", False),
    "a file name outside": (setting("image", file_name="../b/6.png"), "image 6", "leads out of the images' folder", False),
    "a width that is text": (setting("image", width="24"), "image 6", "the stated size is zero or no number: 24x16", False),
    "a width that is null": (setting("image", width=None), "image 6", "the stated size is zero or no number", False),
    "a width that is a list": (setting("image", width=[[24]]), "image 6", "the stated size is zero or no number", False),
    "a width of another image": (setting("image", width=25), "image 6", "but 25x16 is stated", False),
    "an annotation that is text": (appended("captions", "x"), "annotations[6]", "the annotation is no object", True),
    "an annotation of no image": (appended("captions", {"caption": "x"}), "annotations[6]", "image_id None is not among", True),
    "an annotation of another image": (appended("captions", {"image_id": 99, "caption": "x"}), "annotations[6]", "image_id 99", True),
    "an annotation of a list": (appended("captions", {"image_id": [6], "caption": "x"}), "annotations[6]", "is not among the images", True),
    "no caption": (without("caption", "caption"), "image 6", "the caption is empty", False),
    "a caption that is a number": (setting("caption", caption=7), "image 6", "the caption is empty", False),
    "no category": (without("instance", "category_id"), "image 6", "an instance has no category_id", False),
    "a category that is text": (setting("instance", category_id="1"), "image 6", "the category_id 1 is no whole number", False),
    "a category that is a list": (setting("instance", category_id=[1]), "image 6", "is no whole number", False),
    "a category of a half": (setting("instance", category_id=1.5), "image 6", "the category_id 1.5 is no whole number", False),
    "a category that is infinite": (setting("instance", category_id=float("inf")), "image 6", "is no whole number", False),
    "iscrowd that is text": (setting("instance", iscrowd="no"), "image 6", "iscrowd is no, not 0 or 1", False),
    "iscrowd that is a list": (setting("instance", iscrowd=[]), "image 6", "iscrowd is [], not 0 or 1", False),
    "a box that is text": (setting("instance", bbox="1,1,19,11"), "image 6", "the box 1,1,19,11 is not four numbers", False),
    "a box of texts": (setting("instance", bbox=["1", "1", "19", "11"]), "image 6", "is not four numbers", False),
    "a box of three": (setting("instance", bbox=[1, 1, 19]), "image 6", "is not four numbers", False),
    "a box of nan": (setting("instance", bbox=[1, 1, float("nan"), 11]), "image 6", "is not four numbers", False),
    "a box of huge numbers": (setting("instance", bbox=[1.5, 1, 10**400, 11]), "image 6", "is not four numbers", False),
    "a box outside": (setting("instance", bbox=[10, 1, 19, 11]), "image 6", "is outside the 24x16 image", False),
    "a box of negative width": (setting("instance", bbox=[10, 1, -3, 11]), "image 6", "is outside the 24x16 image", False),
    "no mask": (without("instance", "segmentation"), "image 6", "an instance has no mask", False),
    "a mask that is text": (masked("mask"), "image 6", "an instance has no mask", False),
    "a mask of no polygons": (masked([]), "image 6", "an instance has no mask", False),
    "a polygon of odd length": (masked([[1, 1, 20, 1, 20, 12, 1]]), "image 6", "not a list of three or more x, y pairs", False),
    "a polygon of two corners": (masked([[1, 1, 20, 1]]), "image 6", "not a list of three or more x, y pairs", False),
    "a polygon of texts": (masked([["1", "1", "20", "1", "20", "12"]]), "image 6", "not a list of three or more", False),
    "a polygon of lists": (masked([[[1, 1], [20, 1], [20, 12]]]), "image 6", "not a list of three or more x, y pairs", False),
    "a polygon of infinity": (masked([[1, 1, float("inf"), 1, 20, 12]]), "image 6", "is outside the 24x16 image", False),
    "a polygon of huge numbers": (masked([[1, 1, 10**400, 1, 20, 12]]), "image 6", "is outside the 24x16 image", False),
    "a polygon of no area": (masked([[1, 1, 5, 5, 9, 9, 3, 3]]), "image 6", "a mask has no area", False),
    "a polygon of one corner": (masked([[1, 1, 1, 1, 1, 1]]), "image 6", "a mask has no area", False),
    "run lengths without size": (masked({"counts": [384]}), "image 6", "its RLE size is None", False),
    "run lengths of another size": (masked({"size": [24, 16], "counts": [0, 384]}), "image 6", "RLE size is [24, 16]", False),
    "run lengths that are null": (masked({"size": [16, 24], "counts": None}), "image 6", "RLE counts cannot be read", False),
    "run lengths of texts": (masked({"size": [16, 24], "counts": ["384"]}), "image 6", "RLE counts cannot be read", False),
    "run lengths of true": (masked({"size": [16, 24], "counts": [383, True]}), "image 6", "RLE counts cannot be read", False),
    "run lengths too long": (masked({"size": [16, 24], "counts": [10**300, 5]}), "image 6", "the image has 384", False),
    "run lengths of nothing": (masked({"size": [16, 24], "counts": [384]}), "image 6", "a mask is empty", False),
    "packed run lengths that go on and on": (masked({"size": [16, 24], "counts": "o" * 10**6}), "image 6", "cannot be read", False),
    "packed run lengths of other signs": (masked({"size": [16, 24], "counts": "\u732b\ud800"}), "image 6", "cannot be read", False),
    "an instance of no image": (setting("instance", image_id=None), "annotations[5]", "image_id None is not among the images", True),
    "an instance that is a number": (appended("instances", 5), "annotations[6]", "the annotation is no object", True),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_COCO)
def test_a_bad_row_of_coco_is_rejected(tmp_path: Path, name: str) -> None:
    spoil, row, reason, kept = BAD_COCO[name]
    world = Coco(tmp_path)
    spoil(world)
    outcome = world.outcome()
    assert not outcome.error, outcome.error
    found = outcome.table[(outcome.table.row == row) & (outcome.table.split == "train")].reason.tolist()
    assert len(found) == 1 and reason in found[0] and len(outcome.table) == 1, outcome.table.to_dict("records")
    assert len(outcome.rows["train"]) == 5 + kept and len(outcome.rows["test"]) == 6


def raw(name: str, content: str | bytes | None) -> Callable[[Coco], Any]:
    return lambda c: c.raw.update({name: content})


REFUSED_COCO: dict[str, tuple[Callable[[Coco], Any], str]] = {
    "no captions": (raw("captions_a", None), "captions_a.json is missing; check root, captions, instances and splits"),
    "no instances": (raw("instances_a", None), "instances_a.json is missing"),
    "empty captions": (raw("captions_a", ""), "captions_a.json is not valid JSON"),
    "half of the captions": (raw("captions_a", '{"images": ['), "captions_a.json is not valid JSON"),
    "captions nested deeply": (raw("captions_a", DEEP), r"captions_a.json is not valid JSON \(it is nested too deeply\)"),
    "captions in UTF-16": (raw("captions_a", "{}".encode("utf-16")), r"not valid JSON \(is UTF-16, not UTF-8\)"),
    "captions in Latin-1": (raw("captions_a", '{"é": 1}'.encode("latin-1")), "perhaps Latin-1"),
    "captions that are a list": (raw("captions_a", "[]"), "has no lists 'images' and 'annotations'"),
    "images that are an object": (raw("captions_a", '{"images": {}, "annotations": []}'), "has no lists 'images'"),
    "instances that are text": (raw("instances_a", '"x"'), "has no lists 'images' and 'annotations'"),
    "annotations that are null": (raw("instances_a", '{"images": [], "annotations": null}'), "has no lists 'images'"),
    "captions that are a pipe": (
        lambda c: (c.raw.update(captions_a=None), os.mkfifo(c.root / "annotations/captions_a.json")),
        "captions_a.json: it is no regular file but a named pipe",
    ),
    "captions that are a folder": (
        lambda c: (c.raw.update(captions_a=None), (c.root / "annotations/captions_a.json").mkdir()),
        "captions_a.json: it is no regular file but a folder",
    ),
    "captions linked out": (
        lambda c: (
            c.raw.update(captions_a=None),
            shutil.copy(c.root / "annotations/captions_b.json", tmp := c.root.parent / "x.json"),
            (c.root / "annotations/captions_a.json").symlink_to(tmp),
        ),
        "captions_a.json: the file is a link that leads out of the root",
    ),
    "another field": (lambda c: c.source.update(captions="cap_{foo}.json"), "another field than {split}"),
    "a field without name": (lambda c: c.source.update(images="{}"), "another field than {split}"),
    "an attribute": (lambda c: c.source.update(images="{split.__class__}"), "another field than {split}"),
    "a width": (lambda c: c.source.update(instances="{split:>999999999}"), "another field than {split}"),
    "a brace": (lambda c: c.source.update(captions="cap_{split.json"), "a brace without its partner|another field"),
    "captions outside": (lambda c: c.source.update(captions="../{split}.json"), "leads out of root"),
    "images outside": (lambda c: c.source.update(images="/etc"), "leads out of root"),
    "an empty template": (lambda c: c.source.update(images=""), "leads out of root or is empty"),
    "a split outside": (lambda c: c.source.update(splits={"train": "../../x", "test": "b"}), "leads out of root"),
    "train is test": (lambda c: c.source.update(splits={"train": "a", "test": "a"}), "train and test both take the share"),
    "the same files": (lambda c: c.source.update(images="a"), "train and test have 6 images in common"),
    "no test": (lambda c: c.source.update(splits={"train": "a"}), "no split 'test' but train"),
    "all images gone": (lambda c: shutil.rmtree(c.root / "a"), r"split 'train' has no good row, 6 bad ones \(first: a/1.png, image 1"),
    "no images": (lambda c: c.images.clear(), "the split 'train' has 0 rows"),
    "an empty root": (lambda c: c.source.update(root=""), "is empty or no path"),
}


@pytest.mark.parametrize("name", REFUSED_COCO)
def test_bad_coco_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    spoil, sentence = REFUSED_COCO[name]
    world = Coco(tmp_path)
    spoil(world)
    outcome = world.outcome()
    assert re.search(sentence, outcome.error), outcome.error or outcome.table.to_dict("records")


def test_ids_of_mixed_types_are_the_same_ids(tmp_path: Path) -> None:
    world = Coco(tmp_path)
    world.caption["image_id"], world.instance["image_id"], world.images[0]["id"] = "6", 6.0, "1"
    outcome = world.outcome()
    assert not outcome.error and outcome.table.empty and len(outcome.rows["train"]) == 6


def test_masks_that_are_all_crowds_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from hypersd_pipeline.perception.annotations import AnnotatedSplit, category_labels
    from hypersd_pipeline.perception.protocol import LabelMap

    world = Coco(tmp_path)
    for instance in world.instances:
        instance.update(iscrowd=1, segmentation={"size": [16, 24], "counts": [10, 100, 274]})
    assert not world.outcome().error and "split 'train': all of its 6 masks are crowds" in caplog.text
    data = DataConfig(source=world.source)
    manifest = validate(data.source, tmp_path)[0]
    for use in (lambda: AnnotatedSplit(manifest, data, "train", 16, LabelMap()), lambda: category_labels(manifest, data, "train")):
        with pytest.raises(UserError, match="all instance masks of the split 'train' are crowds"):
            use()


def test_annotations_that_changed_since_are_said(tmp_path: Path) -> None:
    from hypersd_pipeline.perception.annotations import AnnotatedSplit
    from hypersd_pipeline.perception.protocol import LabelMap

    world = Coco(tmp_path)
    world.outcome()
    data = DataConfig(source=world.source)
    manifest = validate(data.source, tmp_path)[0]
    world.instance.pop("category_id")
    world.outcome()
    with pytest.raises(UserError, match=r"image 6 of split 'train' has changed since it was validated \(an instance has no category_id\)"):
        AnnotatedSplit(manifest, data, "train", 16, LabelMap())
    (world.root / "b/1.png").unlink()
    with pytest.raises(UserError, match=r"1.png: the file is missing; put the file back, or run data_prep again"):
        load_image(world.root / "b/1.png")


# --- preference pairs --------------------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "a fox", "winner": "images/0.png", "loser": "images/1.png"}
PAIRS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "the line is no JSON object"),
    "nested deeply": (DEEP.encode(), "the line is no JSON object"),
    "Latin-1": (b'{"prompt": "caf\xe9"}', "perhaps Latin-1"),
    "a prompt that is a list": ({**PAIR, "prompt": ["a"]}, "prompt is missing or empty"),
    "a prompt with a surrogate": (json.dumps(PAIR).replace('"a fox"', SURROGATE).encode(), "prompt has a lone surrogate"),
    "a winner outside": ({**PAIR, "winner": "../secret.png"}, "winner: the file name leads out of the folder"),
    "an absolute loser": ({**PAIR, "loser": "/etc/passwd"}, "loser: the file name leads out of the folder"),
    "a winner linked out": ({**PAIR, "winner": "images/link.png"}, "winner: the file is a link that leads out of the root"),
    "a loser that is a pipe": ({**PAIR, "loser": "images/pipe.png"}, "loser: it is no regular file but a named pipe"),
    "a loser that is a folder": ({**PAIR, "loser": "images"}, "loser: it is no regular file but a folder"),
    "a loser that is EPS": ({**PAIR, "loser": "images/eps.png"}, "loser: the image is EPS, which is not read"),
    "a very wide winner": ({**PAIR, "winner": "images/wide.png"}, "winner: the image is 330x20"),
    "the same image, written otherwise": ({**PAIR, "loser": "./images/./0.png"}, "winner and loser are the same image"),
    "a very long name": ({**PAIR, "loser": "x" * 3000}, "loser: the file cannot be opened (File name too long)"),
    "no loser": ({"prompt": "a fox", "winner": "images/0.png"}, "loser is missing or empty"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_bad_pair_is_rejected(tmp_path: Path, name: str) -> None:
    line, reason = PAIRS[name]
    folder = tmp_path / "pairs"
    for image in ("0", "1"):
        write_image(folder / f"images/{image}.png")
    write_image(tmp_path / "secret.png")
    (folder / "images/link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "images/pipe.png")
    (folder / "images/eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    write_image(folder / "images/wide.png", (330, 20))
    bad = line if isinstance(line, bytes) else json.dumps(line).encode()
    (folder / "pairs.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\n" + bad)
    rows, table = read_preferences(folder / "pairs.jsonl")
    assert len(rows) == 1 and table.row.tolist() == ["line 2"] and reason in table.reason[0], table.to_dict("records")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda p: None, "does not exist; give a .jsonl file"),
        (lambda p: p.mkdir(), "no regular file but a folder; give a .jsonl file"),
        (os.mkfifo, "no regular file but a named pipe"),
        (lambda p: p.symlink_to("/dev/zero"), "a link that leads out of the root"),
        (lambda p: p.write_bytes("{}".encode("utf-16")), "the file is UTF-16, not UTF-8"),
        (lambda p: p.write_bytes(b""), "has no good row, 0 bad ones"),
    ],
)
def test_a_bad_file_of_pairs_is_refused(tmp_path: Path, spoil: Callable[[Path], Any], sentence: str) -> None:
    spoil(tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match=sentence) as refusal:
        read_preferences(tmp_path / "pairs.jsonl")
    assert one_sentence(str(refusal.value))


# --- the embedded data, and the manifest -------------------------------------------------------------------------------------------------

SCENES = TwemojiConfig(train=4, val=1, test=4, test_unseen=1)


def first_scene(root: Path) -> Path:
    return min((root / "train").glob("*.png"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(bytes(content))


SPOILT_SCENES: dict[str, Callable[[Path], Any]] = {
    "a scene deleted": lambda root: first_scene(root).unlink(),
    "a scene broken": lambda root: first_scene(root).write_bytes(b""),
    "a scene flipped": lambda root: flip(first_scene(root)),
    "captions broken": lambda root: (root / "annotations/captions_train.json").write_text("{"),
    "captions deleted": lambda root: (root / "annotations/captions_train.json").unlink(),
    "the stamp empty": lambda root: (root / "dataset.json").write_text(""),
    "the stamp nested": lambda root: (root / "dataset.json").write_text(DEEP),
    "the stamp another type": lambda root: (root / "dataset.json").write_text("[]"),
    "a stranger among the scenes": lambda root: (root / "train/x.png").write_bytes(b"x"),
}


@pytest.mark.parametrize("name", SPOILT_SCENES)
def test_damaged_scenes_are_drawn_again(tmp_path: Path, name: str) -> None:
    source = {"kind": "twemoji", **SCENES.model_dump()}
    write_dataset(tmp_path / "dataset", SCENES)
    whole = validate(DataConfig(source=source).source, tmp_path / "dataset")[0].key
    SPOILT_SCENES[name](tmp_path / "dataset")
    outcome = Outcome(source, tmp_path / "dataset")
    assert not outcome.error or ("the embedded data set is damaged" in outcome.error and "run data_prep again" in outcome.error)
    write_dataset(tmp_path / "dataset", SCENES)
    assert validate(DataConfig(source=source).source, tmp_path / "dataset")[0].key == whole


def test_a_missing_scene_is_never_just_a_row_less(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset", SCENES)
    first_scene(tmp_path / "dataset").unlink()
    error = Outcome({"kind": "twemoji", **SCENES.model_dump()}, tmp_path / "dataset").error
    assert "the embedded data set is damaged (train/" in error and "the file is missing); run data_prep again" in error


HEAD = {"root": ".", "splits": ["train"]}
ROW = {"image_id": "a", "file": "a.png", "captions": ["a"], "width": 1, "height": 1, "n_instances": 0, "sha256": "0"}
MANIFESTS: dict[str, tuple[Any, Any]] = {
    "a head that is a list": ([], ROW),
    "a head nested deeply": (DEEP, ROW),
    "a split outside": ({**HEAD, "splits": ["../train"]}, ROW),
    "a split that is a number": ({**HEAD, "splits": [5]}, ROW),
    "a root that is a number": ({**HEAD, "root": 5}, ROW),
    "a row that is a list": (HEAD, [1]),
    "a row without file": (HEAD, {k: v for k, v in ROW.items() if k != "file"}),
    "a row with more": (HEAD, {**ROW, "more": 1}),
    "a row outside": (HEAD, {**ROW, "file": "../a.png"}),
    "a row without captions": (HEAD, {**ROW, "captions": []}),
    "a caption that is a number": (HEAD, {**ROW, "captions": [5]}),
    "a width that is text": (HEAD, {**ROW, "width": "1"}),
    "a row nested deeply": (HEAD, DEEP),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_damaged_manifest_is_said(tmp_path: Path, name: str) -> None:
    head, row = MANIFESTS[name]
    (tmp_path / "root.json").write_text(head if isinstance(head, str) else json.dumps(head))
    (tmp_path / "train.jsonl").write_text(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(UserError, match=r"the manifest is damaged .*run data_prep again"):
        read_manifest(tmp_path)


def test_no_manifest_is_written_outside_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a split is named"):
        write_manifest(tmp_path / "manifest", Manifest(tmp_path, {"../x": ()}))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_there_are_enough_faults() -> None:
    tables = (REJECTED, REFUSED, LINES, BAD_COCO, REFUSED_COCO, PAIRS, SPOILT_SCENES, MANIFESTS)
    assert sum(map(len, tables)) >= 120
