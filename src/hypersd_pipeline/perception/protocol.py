"""What a perceptual model is, and the instances it is given and predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd_pipeline.config import Strict


@dataclass(frozen=True)
class Instances:
    """The instances of one image.

    Attributes:
        masks: bool ``[n, h, w]``. labels: int64 ``[n]``, a model's own classes (`LabelMap`).
        scores: float ``[n]`` in [0, 1], of predictions only.
    """

    masks: Tensor
    labels: Tensor
    scores: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Instances:
        """The same on another device."""
        return Instances(self.masks.to(device), self.labels.to(device), None if self.scores is None else self.scores.to(device))


class LabelMap(Strict):
    """Which annotated categories a model knows, and as which of its classes.

    Attributes:
        category_ids: COCO category id of each class, class 0 first. Empty for a class-agnostic model, to which every instance is "object".
        names: of the classes, for reports.
    """

    category_ids: tuple[int, ...] = ()
    names: tuple[str, ...] = ("object",)

    def __len__(self) -> int:
        return len(self.names)

    def label(self, category_id: int) -> int | None:
        """The class of a category. None where the model does not know it."""
        if not self.category_ids:
            return 0
        return self.category_ids.index(category_id) if category_id in self.category_ids else None


# COCO2017's 80 categories of things have the ids 1 to 90 with these left out. Models trained on it number them 0 to 79 in this order.
_COCO_UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in _COCO_UNUSED)


class PerceptualModel(Protocol):
    """An instance segmenter with frozen weights, through which gradients flow to the pixels.

    Attributes:
        name: for metric names and reports. labels: its classes.
        size_divisor: images whose sides are no multiple of it are padded.
    """

    name: str
    labels: LabelMap

    @property
    def device(self) -> torch.device: ...

    def to(self, device: torch.device | str) -> Self: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def loss(self, images: Tensor, instances: Sequence[Instances]) -> Tensor:
        """The model's training loss (scalar) of ``images`` float ``[b, 3, h, w]`` in [0, 1] against each one's true instances.

        Nothing is clamped: a pixel outside the range still gets its gradient. The loss is the same at every call on the same input. It is
        computed in float32, inside autocast too.

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        ...

    def predict(self, images: Tensor) -> list[Instances]:
        """Instances with scores, best first, for each of ``images`` float ``[b, 3, h, w]`` in [0, 1]. No gradient."""
        ...


def check_batch(images: Tensor, instances: Sequence[Instances]) -> None:
    """Raises ValueError if masks or labels do not fit ``images`` ``[b, 3, h, w]``, one `Instances` an image."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, not float [b, 3, h, w]")
    if len(instances) != len(images):
        raise ValueError(f"{len(images)} images, but the instances of {len(instances)}")
    for number, item in enumerate(instances):
        if item.masks.dtype != torch.bool or item.masks.shape != (len(item), *images.shape[-2:]):
            raise ValueError(
                f"image {number}: masks are {item.masks.dtype} {tuple(item.masks.shape)}, not bool {(len(item), *images.shape[-2:])}"
            )
        if item.labels.dtype != torch.int64:
            raise ValueError(f"image {number}: labels are {item.labels.dtype}, not int64")


def pad_to_multiple(images: Tensor, divisor: int) -> Tensor:
    """Zeros at the right and at the bottom, so that both sides are multiples of ``divisor``. The identity where they are."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % divisor, 0, -height % divisor)) if height % divisor or width % divisor else images
