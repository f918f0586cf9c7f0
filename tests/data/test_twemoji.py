"""The embedded scenes: masks, captions, splits, and that they are what the seed says."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pydantic import ValidationError

from hypersd_pipeline.data import twemoji
from hypersd_pipeline.data.twemoji import TwemojiConfig, make_scene
from hypersd_pipeline.errors import UserError

CONFIG = TwemojiConfig(train=40, val=10, test=20, test_unseen=10)


def scenes(split, n=300):
    return [make_scene(CONFIG, split, i) for i in range(n)]


def facts(scene):
    """(name, colour, place, company) of each thing in a scene."""
    return {(name, scene.colour, place, frozenset(scene.names) - {name}) for name, place in zip(scene.names, scene.places, strict=True)}


def test_no_two_names_share_their_pixels():
    pixels = [np.asarray(Image.open(p).convert("RGBA")).tobytes() for p in twemoji.sprites().values()]
    assert len(set(pixels)) == len(pixels) == 1629  # 26 duplicates among 1655 are gone
    assert len(twemoji.drawable_names()) >= 360


def test_test_and_validation_hold_only_combinations_that_training_never_saw():
    seen = {split: set().union(*(facts(s) for s in scenes(split))) for split in ("train", "val", "test")}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["val"]
    assert not seen["val"] & seen["test"]


def test_names_of_test_are_trained_and_unseen_names_are_not():
    names = {split: {n for s in scenes(split, 1500) for n in s.names} for split in ("train", "test", "test_unseen")}
    assert names["test"] <= names["train"]
    assert len(names["train"]) == 320
    assert not names["test_unseen"] & (names["train"] | names["test"])


def test_scene_is_a_function_of_seed_split_and_index():
    assert np.array_equal(make_scene(CONFIG, "train", 3).image, make_scene(TwemojiConfig(train=9999), "train", 3).image)
    assert not np.array_equal(make_scene(CONFIG, "train", 3).image, make_scene(TwemojiConfig(seed=1), "train", 3).image)


def test_masks_are_exact_disjoint_and_inside():
    for scene in scenes("train", 60):
        assert scene.image.shape == (64, 64, 3) and scene.image.dtype == np.uint8
        assert 1 <= len(scene.masks) <= 3
        assert np.sum(scene.masks, axis=0).max() == 1
        assert all(mask.sum() > 20 for mask in scene.masks)
        background = np.median(scene.image[~np.any(scene.masks, axis=0)], axis=0)
        base = np.array(twemoji.COLOURS[scene.colour])
        assert np.abs(background - base).max() <= 6


def test_caption_says_what_where_and_on_what():
    caption = twemoji.caption_of("blue", ("fox", "owl"), ("on the left", "on the right"))
    assert caption == "a fox on the left and an owl on the right, blue background"


def test_written_data_set_is_coco(tmp_path):
    twemoji.write_dataset(tmp_path, CONFIG)
    for split, n in (("train", 40), ("val", 10), ("test", 20), ("test_unseen", 10)):
        captions = json.loads((tmp_path / "annotations" / f"captions_{split}.json").read_text())
        instances = json.loads((tmp_path / "annotations" / f"instances_{split}.json").read_text())
        assert len(captions["images"]) == len(captions["annotations"]) == len(list((tmp_path / split).glob("*.png"))) == n
        first = instances["annotations"][0]
        scene = make_scene(CONFIG, split, 0)
        assert np.array_equal(coco_mask.decode(first["segmentation"]).astype(bool), scene.masks[0])
        names = {c["id"]: c["name"] for c in instances["categories"]}
        assert names[first["category_id"]] == scene.names[0]
    before = (tmp_path / "train").stat().st_mtime_ns
    twemoji.write_dataset(tmp_path, CONFIG)  # finished: nothing is written again
    assert (tmp_path / "train").stat().st_mtime_ns == before
    smaller = TwemojiConfig(train=5, val=10, test=20, test_unseen=10)
    twemoji.write_dataset(tmp_path, smaller)
    assert len(list((tmp_path / "train").glob("*.png"))) == 5


def test_too_few_or_too_many_names_are_refused(tmp_path):
    with pytest.raises(ValidationError, match="greater than or equal to 300"):
        TwemojiConfig(names=299)
    with pytest.raises(UserError, match="ask for fewer"):
        twemoji.write_dataset(tmp_path, TwemojiConfig(names=5000))
