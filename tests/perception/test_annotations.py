"""Instance masks of COCO's kinds, fitted as the images are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import hypersd_pipeline  # noqa: F401
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.images import fit
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.perception.annotations import AnnotatedSplit, category_labels, decode_mask, fit_mask
from hypersd_pipeline.perception.protocol import LabelMap


def box(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


@pytest.fixture
def coco(tmp_path):
    """Four images, 80 x 40: polygons, run lengths, a crowd, a category of its own. The last has no instance."""
    (tmp_path / "p").mkdir()
    (tmp_path / "annotations").mkdir()
    images = []
    for i in range(4):
        Image.fromarray(np.full((40, 80, 3), 60 * i, np.uint8)).save(tmp_path / "p" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 80, "height": 40})
    crowd = {"size": [40, 80], "counts": [1000, 400, 1800]}
    found = [
        {"id": 1, "image_id": 0, "category_id": 7, "segmentation": box(30, 10, 50, 30)},
        {"id": 2, "image_id": 0, "category_id": 3, "segmentation": box(0, 0, 10, 10)},  # outside the centre square
        {"id": 3, "image_id": 1, "category_id": 3, "segmentation": crowd, "iscrowd": 1},
        {"id": 4, "image_id": 1, "category_id": 3, "segmentation": {"size": [40, 80], "counts": [1600, 800, 800]}},
        {"id": 5, "image_id": 2, "category_id": 99, "segmentation": box(30, 10, 50, 30)},
    ]
    captions = [{"id": i, "image_id": i, "caption": f"image {i}"} for i in range(4)]
    for kind, rows in (("captions", captions), ("instances", found)):
        (tmp_path / "annotations" / f"{kind}_p.json").write_text(json.dumps({"images": images, "annotations": rows}))
    data = DataConfig(source={"kind": "coco", "root": str(tmp_path), "splits": {"train": "p"}})
    return data, validate(data.source, tmp_path)[0]


def test_the_three_forms_of_a_mask():
    from pycocotools import mask as coco_mask

    expected = np.zeros((6, 8), bool)
    expected[2:4, 1:5] = True
    flat = expected.T.ravel()  # run lengths go down the columns
    counts = [int(v) for v in np.diff(np.r_[0, np.flatnonzero(np.diff(flat.astype(int))) + 1, flat.size])]
    assert sum(counts) == 48
    packed = coco_mask.encode(np.asfortranarray(expected.astype(np.uint8)))
    for form in (box(1, 2, 5, 4), {"size": [6, 8], "counts": counts}, {**packed, "counts": packed["counts"].decode()}):
        assert np.array_equal(decode_mask(form, 8, 6), expected)


@pytest.mark.parametrize(("width", "height", "resolution"), [(80, 40, 40), (40, 90, 20), (64, 64, 64), (51, 37, 32)])
def test_masks_are_fitted_as_images_are(width, height, resolution):
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 4 : width // 2] = True
    image, _ = fit(Image.fromarray(np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255), resolution)
    fitted = fit_mask(mask, resolution)
    assert fitted.shape == (resolution, resolution) and fitted.any()
    differing = fitted != (image[..., 0] > 127)
    assert differing.sum() <= 0.1 * fitted.sum() + 4  # nearest and bicubic differ on the border at most


def test_what_a_class_agnostic_model_is_given(coco):
    data, manifest = coco
    split = AnnotatedSplit(manifest, data, "train", 20, LabelMap())
    assert split.annotated().tolist() == [0, 1, 2] and len(split) == 4
    images, instances = split.batch(torch.tensor([0, 1, 3]))
    assert images.shape == (3, 3, 20, 20) and images[1].unique().tolist() == pytest.approx([60 / 255])
    assert [len(i) for i in instances] == [1, 1, 0]  # outside, crowd and none left out
    expected = torch.zeros(20, 20, dtype=torch.bool)
    expected[5:15, 5:15] = True  # 30..50 of 80 is 15..25 of 40, minus the crop's 10
    assert torch.equal(instances[0].masks[0], expected)
    assert instances[1].masks[0].any(0).nonzero().flatten().tolist() == list(range(10, 20))  # columns 40 to 59
    assert split.caption(3) == "image 3"


def test_classes_by_category(coco):
    data, manifest = coco
    labels = category_labels(manifest, data, "train")
    assert labels.category_ids == (3, 7, 99) and len(labels) == 3
    split = AnnotatedSplit(manifest, data, "train", 20, LabelMap(category_ids=(3, 7), names=("a", "b")))
    assert [split.instances(i).labels.tolist() for i in range(3)] == [[1], [0], []]  # 99 is unknown to that model


def test_rows_are_the_caches(coco):
    from hypersd_pipeline.data.cache_build import select_rows

    data, manifest = coco
    few = data.model_copy(update={"max_images": 2})
    split = AnnotatedSplit(manifest, few, "train", 20, LabelMap())
    assert [row.file for row in split.rows] == [row.file for row in select_rows(manifest.splits["train"], few)] and len(split) == 2


def test_data_without_masks(coco, tmp_path):
    data, manifest = coco
    with pytest.raises(UserError, match="no split 'test'"):
        AnnotatedSplit(manifest, data, "test", 20, LabelMap())
    with pytest.raises(UserError, match="no instance masks"):
        AnnotatedSplit(manifest, DataConfig(source={**data.source.model_dump(), "instances": None}), "train", 20, LabelMap())
    with pytest.raises(UserError, match="no instance masks"):
        AnnotatedSplit(manifest, DataConfig(source={"kind": "folder", "root": str(tmp_path)}), "train", 20, LabelMap())
