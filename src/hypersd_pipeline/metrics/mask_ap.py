"""COCO's mask average precision (pycocotools), of a model on real images, or on generated ones with the masks they should show."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hypersd_pipeline.errors import UserError

if TYPE_CHECKING:
    from hypersd_pipeline.perception.protocol import Instances, PerceptualModel

LARGEST = 100  # detections per image that count, COCO's number


def mask_ap(model: PerceptualModel, images: Tensor, instances: Sequence[Instances], batch_size: int = 32) -> dict[str, float]:
    """`average_precision` of the model's predictions.

    Args:
        images: float ``[n, 3, h, w]`` in [0, 1]. instances: the true ones, with the model's labels.

    Raises:
        UserError: there is no true instance at all.
    """
    batches = images.split(batch_size)
    return average_precision([found for batch in batches for found in model.predict(batch.to(model.device))], instances)


def average_precision(predicted: Sequence[Instances], truth: Sequence[Instances]) -> dict[str, float]:
    """COCO's metrics of predictions with scores against true instances, one `Instances` an image each, mean over classes.

    Returns:
        ``mask_ap`` (mean over IoU thresholds .50 to .95), ``mask_ap50``, ``mask_ap75``, ``mask_ar`` (recall over the same thresholds), all
        in [0, 1].

    Raises:
        UserError: there is no true instance at all.
    """
    if not any(len(item) for item in truth):
        raise UserError("mask AP: none of the images has a true instance; take images that are annotated.")
    if len(predicted) != len(truth):
        raise ValueError(f"predictions of {len(predicted)} images, truth of {len(truth)}")
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress and a table
        evaluation = COCOeval(_coco(truth, truth), _coco(predicted, truth), "segm")
        evaluation.params.maxDets = [1, 10, LARGEST]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ap, ap50, ap75, ar = (float(evaluation.stats[i]) for i in (0, 1, 2, 8))
    return {"mask_ap": ap, "mask_ap50": ap50, "mask_ap75": ap75, "mask_ar": ar}


def _coco(items: Sequence[Instances], truth: Sequence[Instances]) -> Any:
    """pycocotools' table of instances. Image ids are positions, category ids are labels + 1."""
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO

    annotations: list[dict[str, Any]] = []
    for image_id, item in enumerate(items):
        masks = item.masks.cpu().numpy().astype(np.uint8)
        scores = [1.0] * len(item) if item.scores is None else item.scores.tolist()
        for mask, label, score in zip(masks, item.labels.tolist(), scores, strict=True):
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, "score": score, "iscrowd": 0,
                "segmentation": coco_mask.encode(np.asfortranarray(mask)), "area": int(mask.sum()),
            })  # fmt: skip
    table = COCO()
    images = [{"id": i, "height": item.masks.shape[-2], "width": item.masks.shape[-1]} for i, item in enumerate(truth)]
    table.dataset = {"images": images, "annotations": annotations, "categories": [{"id": i} for i in _classes(truth)]}
    table.createIndex()
    return table


def _classes(truth: Iterable[Instances]) -> list[int]:
    """Category ids with true instances: AP is their mean, as COCO's is."""
    return sorted({label + 1 for item in truth for label in item.labels.tolist()})
