"""Mask AP against values worked out by hand."""

import pytest
import torch

import hypersd_pipeline  # noqa: F401
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.metrics.mask_ap import average_precision, mask_ap
from hypersd_pipeline.perception.protocol import Instances


def square(*lefts, labels=None, scores=None, side=10, size=40):
    """Squares of 10 x 10 pixels with the same top, at the given columns."""
    masks = torch.zeros(len(lefts), size, size, dtype=torch.bool)
    for mask, left in zip(masks, lefts, strict=True):
        mask[5 : 5 + side, left : left + side] = True
    labels = torch.tensor(labels or [0] * len(lefts), dtype=torch.int64)
    return Instances(masks, labels, None if scores is None else torch.tensor(scores))


def test_perfect_is_one():
    truth = [square(0, 20), square(10)]
    assert average_precision([square(0, 20, scores=[0.9, 0.2]), square(10, scores=[0.5])], truth) == dict.fromkeys(
        ("mask_ap", "mask_ap50", "mask_ap75", "mask_ar"), pytest.approx(1.0)
    )


def test_a_known_shift():
    # two columns of ten: 80 pixels in common, 120 together, IoU 2/3: right at .50, .55, .60 and .65, four of ten thresholds
    metrics = average_precision([square(2, scores=[0.9])], [square(0)])
    assert metrics == pytest.approx({"mask_ap": 0.4, "mask_ap50": 1.0, "mask_ap75": 0.0, "mask_ar": 0.4})


def test_one_of_two_missed():
    # precision 1 up to recall 1/2: 51 of COCO's 101 recall levels
    assert average_precision([square(0, scores=[0.9])], [square(0, 20)])["mask_ap"] == pytest.approx(51 / 101)


def test_a_confident_phantom_halves_the_precision():
    assert average_precision([square(20, 0, scores=[0.9, 0.8])], [square(0)])["mask_ap"] == pytest.approx(0.5)
    assert average_precision([square(20, 0, scores=[0.7, 0.8])], [square(0)])["mask_ap"] == pytest.approx(1.0)


def test_a_mask_counts_for_its_own_image_and_class_only():
    truth = [square(0), square(20)]
    assert average_precision([square(20, scores=[0.9]), square(0, scores=[0.9])], truth)["mask_ap"] == 0
    metrics = average_precision([square(0, 20, labels=[0, 0], scores=[0.9, 0.8])], [square(0, 20, labels=[0, 1])])
    assert metrics["mask_ap"] == pytest.approx(0.5)  # mean of class 0 (1.0) and class 1 (nothing found)


def test_nothing_found_and_nothing_to_find():
    assert average_precision([square(scores=[])], [square(0)])["mask_ap"] == 0
    with pytest.raises(UserError, match="true instance"):
        average_precision([square(0, scores=[0.5])], [square()])


def test_of_a_model():
    class Finds:
        """Masks of the pixels above one half, as one instance."""

        device = torch.device("cpu")

        def predict(self, images):
            return [Instances(image[:1] > 0.5, torch.zeros(1, dtype=torch.int64), torch.ones(1)) for image in images]

    truth = [square(left) for left in (0, 10, 20)]
    images = torch.stack([item.masks.float().expand(3, -1, -1) for item in truth])
    assert mask_ap(Finds(), images, truth, batch_size=2)["mask_ap"] == pytest.approx(1.0)
    assert mask_ap(Finds(), images.roll(2, -1), truth)["mask_ap"] == pytest.approx(0.4)
