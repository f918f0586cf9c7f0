"""transformers' Mask2Former as a perceptual model: the other teacher that UniFL compared SOLO with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hypersd_pipeline.config import Sha256, Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import check_sha256, hub_folder
from hypersd_pipeline.models.dual_encoder import imagenet_normalise
from hypersd_pipeline.models.tensors import check_finite, check_report
from hypersd_pipeline.perception.protocol import COCO_CATEGORY_IDS, Instances, LabelMap, check_batch, pad_to_multiple
from hypersd_pipeline.verdicts import remembered

MAX_PER_IMAGE = 100


class Mask2FormerConfig(Strict):
    """transformers' Mask2Former (arXiv 2112.01527).

    Attributes:
        weights: a local folder with ``config.json`` and ``model.safetensors``, or a hub id such as
            ``facebook/mask2former-swin-tiny-coco-instance``.
        revision: of the hub repository. sha256: of ``model.safetensors``, checked where given.
        category_ids: as of `SoloConfig`.
        score_threshold: predictions below are dropped.
    """

    kind: Literal["mask2former"]
    weights: str
    revision: str | None = None
    sha256: Sha256 | None = None
    category_ids: tuple[int, ...] | None = None
    score_threshold: float = Field(default=0.05, ge=0, lt=1)

    def files(self) -> list[Path]:
        """Configuration and weights, found, fetched and checked. Raises UserError."""
        names = ("config.json", "model.safetensors")
        folder = Path(self.weights).expanduser()
        if not folder.is_dir():
            if folder.is_absolute() or self.weights.count("/") != 1 or self.weights.startswith("."):
                raise UserError(f"weights: there is no folder {folder}; give one with {' and '.join(names)}, or a hub id.")
            folder = hub_folder(self.weights, names, self.revision, "weights")
        for path in (files := [folder / name for name in names]):
            if not path.is_file():
                raise UserError(f"{path} is missing; give a folder with {' and '.join(names)}.")
        check_sha256(files[1], self.sha256)
        return files

    def check(self) -> None:
        """Raises UserError for weights that are missing, damaged or of another network."""
        check_mask2former(self)

    def load(self, device: torch.device | str) -> Mask2Former:
        """The model that the configuration names, in float32.

        Raises:
            UserError: the weights are missing, are of another network, or cannot be fetched.
        """
        return load_mask2former(self, device)


class Mask2Former(nn.Module):
    """A `PerceptualModel` around transformers' network, frozen and in ``eval`` mode.

    Its loss compares masks at random points. They are drawn with the same seed at every call, so that the loss is a function of its input,
    and PyTorch's global generators are left as they were.
    """

    size_divisor = 32
    name = "mask2former"

    def __init__(self, net: nn.Module, labels: LabelMap, score_threshold: float = 0.05) -> None:
        super().__init__()
        self.net, self.labels, self.score_threshold = net, labels, score_threshold
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def loss(self, images: Tensor, instances: Sequence[Instances]) -> Tensor:
        """See `PerceptualModel.loss`: classes, masks and Dice after Hungarian matching, of every decoder layer."""
        check_batch(images, instances)
        pixels = pad_to_multiple(imagenet_normalise(images.float()), self.size_divisor)
        masks = [pad_to_multiple(item.masks.to(pixels), self.size_divisor) for item in instances]
        labels = [item.labels.to(pixels.device) for item in instances]
        forked = torch.random.fork_rng(devices=[pixels.device] if pixels.is_cuda else [])
        with forked, torch.autocast(pixels.device.type, enabled=False):
            torch.manual_seed(0)
            return self.net(pixel_values=pixels, mask_labels=masks, class_labels=labels).loss.sum()

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[Instances]:
        """See `PerceptualModel.predict`. A query's score is its class probability times its mask's mean probability (its own inference)."""
        height, width = images.shape[-2:]
        pixels = pad_to_multiple(imagenet_normalise(images.float()), self.size_divisor)
        output = self.net(pixel_values=pixels)
        logits = F.interpolate(output.masks_queries_logits, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
        classes = output.class_queries_logits.softmax(-1)[..., :-1]  # the last one is "nothing"
        return [self._instances(c, m) for c, m in zip(classes, logits[..., :height, :width], strict=True)]

    def _instances(self, classes: Tensor, logits: Tensor) -> Instances:
        """Of one image: class probabilities ``[q, classes]``, mask logits ``[q, h, w]``."""
        scores, flat = classes.flatten().topk(min(MAX_PER_IMAGE, classes.numel()))
        query, label = flat // classes.shape[1], flat % classes.shape[1]
        masks = logits[query] > 0
        area = masks.sum((1, 2))
        scores = scores * (logits[query].sigmoid() * masks).sum((1, 2)) / area.clamp(min=1)
        order = scores.argsort(descending=True)
        order = order[(scores[order] > self.score_threshold) & (area[order] > 0)]
        return Instances(masks[order], label[order], scores[order])


def load_mask2former(config: Mask2FormerConfig, device: torch.device | str) -> Mask2Former:
    """See `Mask2FormerConfig.load`."""
    from transformers import Mask2FormerForUniversalSegmentation, logging

    logging.disable_progress_bar()  # a bar per opened file would drown the stages' own
    folder = config.files()[0].parent
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        net, report = Mask2FormerForUniversalSegmentation.from_pretrained(folder, **options)
    except Exception as error:  # whatever a file of another network makes transformers raise
        raise UserError(f"{folder}: is no Mask2Former ({' '.join(str(error).split())[:160]}); correct weights.") from error
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise UserError(f"{folder}: lacks weights of a Mask2Former ({missing[0]} and {len(missing) - 1} more); correct weights.")
    return Mask2Former(net.float(), _labels(config, net.config), config.score_threshold).to(device)


def check_mask2former(config: Mask2FormerConfig) -> None:
    """Raises UserError for weights that `load_mask2former` would refuse, or that are NaN. Weights that were good are not read again."""
    from transformers import Mask2FormerForUniversalSegmentation, logging

    files = config.files()
    folder = files[0].parent

    def check() -> bool:
        logging.disable_progress_bar()
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        try:
            net, report = Mask2FormerForUniversalSegmentation.from_pretrained(
                folder, **options, device_map="meta", ignore_mismatched_sizes=True
            )
        except Exception as error:  # whatever a file of another network makes transformers raise
            raise UserError(f"{folder}: is no Mask2Former ({' '.join(str(error).split())[:160]}); correct weights.") from error
        check_report(files[1], {**report, "unexpected_keys": ()}, "correct weights")
        _labels(config, net.config)
        check_finite(files[1])
        return True

    remembered("mask2former", files, config.model_dump(mode="json"), check)


def _labels(config: Mask2FormerConfig, published: Any) -> LabelMap:
    names = tuple(published.id2label[i] for i in range(published.num_labels))
    if len(names) == 1 and not config.category_ids:
        return LabelMap(names=names)
    ids = config.category_ids or COCO_CATEGORY_IDS
    if len(ids) != len(names):
        raise UserError(
            f"{config.weights}: has {len(names)} classes, but there are {len(ids)} category_ids; give the category id of each class."
        )
    return LabelMap(category_ids=ids, names=names)
