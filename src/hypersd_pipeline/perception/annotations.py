"""Images of the data set with their instance masks, fitted to the model's square as the latent cache fits the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hypersd_pipeline.data.cache_build import select_rows
from hypersd_pipeline.data.coco import instance_fault
from hypersd_pipeline.data.config import DataConfig, FolderSource, PromptsSource, ShardsSource
from hypersd_pipeline.data.images import fit
from hypersd_pipeline.data.rows import Manifest, RawRow, Row
from hypersd_pipeline.data.stored import load_row
from hypersd_pipeline.data.validate import read_splits
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.perception.protocol import Instances, LabelMap


class AnnotatedSplit:
    """One split's images and instances. Row numbers are those of the latent cache's split (after ``data.max_images``).

    Crowds, categories that the model does not know, and instances with fewer than ``min_area`` visible pixels are left out.

    Args:
        resolution: side of the square in pixels.
        labels: the classes of the model that the instances are for.

    Raises:
        UserError: the data set has no such split, or no instance masks.
    """

    def __init__(self, manifest: Manifest, data: DataConfig, split: str, resolution: int, labels: LabelMap, min_area: int = 4) -> None:
        self.manifest, self.resolution, self.labels, self.min_area = manifest, resolution, labels, min_area
        if not manifest.splits.get(split):
            raise UserError(f"manifest: there is no split '{split}'; name it in data.source and run data_prep again.")
        self.rows = select_rows(manifest.splits[split], data)
        self._annotations = _annotations(manifest, data, split, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def annotated(self) -> Tensor:
        """Numbers of the rows with at least one annotation, int64 ``[n]``."""
        return torch.tensor([i for i, row in enumerate(self.rows) if self._annotations.get(row.image_id)], dtype=torch.int64)

    def caption(self, index: int) -> str:
        """The row's first caption."""
        return self.rows[index].captions[0]

    def image(self, index: int) -> Tensor:
        """float32 ``[3, resolution, resolution]`` in [0, 1]."""
        pixels, _ = fit(load_row(self.manifest, self.rows[index]), self.resolution)
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255

    def instances(self, index: int) -> Instances:
        """The row's instances, in the order of the annotations. On the CPU."""
        row, masks, labels = self.rows[index], [], []
        for annotation in self._annotations.get(row.image_id, ()):
            label = self.labels.label(annotation["category_id"])
            if label is None or annotation.get("iscrowd"):
                continue
            mask = fit_mask(decode_mask(annotation["segmentation"], row.width, row.height), self.resolution)
            if mask.sum() >= self.min_area:
                masks.append(mask)
                labels.append(label)
        stacked = np.stack(masks) if masks else np.zeros((0, self.resolution, self.resolution), bool)
        return Instances(torch.from_numpy(stacked), torch.tensor(labels, dtype=torch.int64))

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, list[Instances]]:
        """Images ``[b, 3, resolution, resolution]`` and the instances of each."""
        numbers = [int(i) for i in indices]
        return torch.stack([self.image(i) for i in numbers]), [self.instances(i) for i in numbers]


def _annotations(manifest: Manifest, data: DataConfig, split: str, rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """COCO annotations by image id.

    Raises:
        UserError: there are none, all are crowds, or the file has changed since the rows were validated.
    """
    cure = "masks come with kind: coco (instances), or with the embedded scenes"
    if isinstance(data.source, FolderSource | ShardsSource | PromptsSource):
        what = "a folder of images has" if isinstance(data.source, FolderSource) else f"{data.source.kind} have"
        raise UserError(f"data.source: {what} no instance masks; {cure}.")
    wanted = {row.image_id: row for row in rows}
    found: dict[str, list[dict[str, Any]]] = {}
    for raw in read_splits(data.source, manifest.root)[split]:
        if isinstance(raw, RawRow) and raw.instances and (row := wanted.get(raw.image_id)) is not None:
            if fault := next((f for i in raw.instances if (f := instance_fault(i, row.width, row.height))), None):
                raise UserError(
                    f"{manifest.root}: {raw.label} of split '{split}' has changed since it was validated ({fault}); run data_prep again."
                )
            found[raw.image_id] = list(raw.instances)
    if not found:
        raise UserError(f"data.source: the split '{split}' has no instance masks; {cure}.")
    if all(item.get("iscrowd") for items in found.values() for item in items):
        raise UserError(f"data.source: all instance masks of the split '{split}' are crowds, which are not learned from; {cure}.")
    return found


def category_labels(manifest: Manifest, data: DataConfig, split: str) -> LabelMap:
    """A class for each category that the split has instances of, in the order of their ids."""
    annotations = _annotations(manifest, data, split, manifest.splits.get(split, ()))
    ids = tuple(sorted({int(item["category_id"]) for items in annotations.values() for item in items}))
    return LabelMap(category_ids=ids, names=tuple(f"category {i}" for i in ids))


def decode_mask(segmentation: Any, width: int, height: int) -> np.ndarray:
    """COCO's polygons, run lengths or compressed run lengths -> bool ``[height, width]``."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return coco_mask.decode(rle).astype(bool)


def fit_mask(mask: np.ndarray, resolution: int) -> np.ndarray:
    """The resize and the crop of `hypersd_pipeline.data.images.fit`, without new values: bool ``[resolution, resolution]``."""
    height, width = mask.shape
    scale = resolution / min(width, height)
    size = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    image = Image.fromarray(mask.astype(np.uint8))
    image = image.resize(size, Image.Resampling.NEAREST) if image.size != size else image
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return np.array(image.crop((left, top, left + resolution, top + resolution))).astype(bool)
