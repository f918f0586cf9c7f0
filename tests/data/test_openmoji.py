"""Scenes in OpenMoji's style: the same scenes, with other glyphs."""

import json

import numpy as np
import pytest

from hypersd_pipeline.data import openmoji, twemoji
from hypersd_pipeline.data.twemoji import TwemojiConfig, drawable_names, make_scene
from hypersd_pipeline.errors import UserError

SMALL = TwemojiConfig(train=3, val=1, test=2, test_unseen=1)


def test_every_name_has_a_glyph():
    assert set(drawable_names()) <= set(openmoji._characters())
    for name in drawable_names()[::10]:
        colour, alpha = openmoji.sprite(name, 24)
        assert colour.shape == (24, 24, 3) and alpha.shape == (24, 24) and colour.max() <= 1.0
        assert alpha.mean() > 0.05 and colour[alpha == 0].max(initial=0) < 0.2, name  # something is drawn, and the colour is premultiplied


def test_a_scene_differs_in_its_glyphs_alone():
    for index in range(6):
        ours, theirs = make_scene(SMALL, "train", index, openmoji.sprite), make_scene(SMALL, "train", index)
        assert (ours.caption, ours.names, ours.places) == (theirs.caption, theirs.names, theirs.places)
        drawn = np.logical_or.reduce([*ours.masks, *theirs.masks])
        outside = np.abs(ours.image.astype(int) - theirs.image.astype(int)).max(-1)[~drawn]
        assert (outside > 8).mean() < 0.15  # soft borders
        assert not np.array_equal(ours.image, theirs.image)


def test_the_data_set_says_its_style(tmp_path):
    openmoji.write_scenes(tmp_path / "open", SMALL)
    twemoji.write_dataset(tmp_path / "twe", SMALL)
    found = {name: json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("open", "twe")}
    assert found["open"]["style"] == "openmoji" and "style" not in found["twe"]
    stamp = (tmp_path / "open" / "dataset.json").stat().st_mtime_ns
    openmoji.write_scenes(tmp_path / "open", SMALL)
    assert (tmp_path / "open" / "dataset.json").stat().st_mtime_ns == stamp  # it is not drawn again


def test_without_the_package_the_key_and_the_cure_are_named(monkeypatch):
    monkeypatch.setattr(openmoji, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"compatibility.bases.x: OpenMoji is not installed; install it with pip install"):
        openmoji.font_file("compatibility.bases.x")
