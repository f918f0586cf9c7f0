"""transformers' Mask2Former as a perceptual model: the other teacher that UniFL compared SOLO with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.dual_encoder import imagenet_normalise
from hypersd_pipeline.perception.config import Mask2FormerConfig
from hypersd_pipeline.perception.protocol import COCO_CATEGORY_IDS, Instances, LabelMap, check_batch, pad_to_multiple

MAX_PER_IMAGE = 100
_FILES = ("config.json", "model.safetensors")


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
        """Of one picture: class probabilities ``[q, classes]``, mask logits ``[q, h, w]``."""
        scores, flat = classes.flatten().topk(min(MAX_PER_IMAGE, classes.numel()))
        query, label = flat // classes.shape[1], flat % classes.shape[1]
        masks = logits[query] > 0
        area = masks.sum((1, 2))
        scores = scores * (logits[query].sigmoid() * masks).sum((1, 2)) / area.clamp(min=1)
        order = scores.argsort(descending=True)
        order = order[(scores[order] > self.score_threshold) & (area[order] > 0)]
        return Instances(masks[order], label[order], scores[order])


def load_mask2former(config: Mask2FormerConfig, device: torch.device | str = "cpu") -> Mask2Former:
    """The model that the configuration names, in float32.

    Raises:
        UserError: the weights are missing, are of another network, or cannot be fetched.
    """
    from transformers import Mask2FormerForUniversalSegmentation, logging

    logging.disable_progress_bar()  # a bar per opened file would drown the stages' own
    folder = mask2former_files(config)[0].parent
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        net, report = Mask2FormerForUniversalSegmentation.from_pretrained(folder, **options)
    except Exception as error:  # whatever a file of another network makes transformers raise
        raise UserError(f"{folder}: is no Mask2Former ({' '.join(str(error).split())[:160]}); correct weights.") from error
    missing = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if missing:
        raise UserError(f"{folder}: lacks weights of a Mask2Former ({missing[0]} and {len(missing) - 1} more); correct weights.")
    return Mask2Former(net.float(), _labels(config, net.config), config.score_threshold).to(device)


def mask2former_files(config: Mask2FormerConfig) -> list[Path]:
    """Configuration and weights, found, fetched and checked. Raises UserError."""
    folder = _folder(config)
    if config.sha256 is not None:
        with open(folder / _FILES[1], "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(config.sha256):
            raise UserError(f"{folder / _FILES[1]}: its sha256 is {found}, not {config.sha256}; fetch the file again, or correct sha256.")
    return [folder / name for name in _FILES]


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


def _folder(config: Mask2FormerConfig) -> Path:
    """The local folder; a hub id is downloaded into the hub's cache first."""
    folder = Path(config.weights).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or config.weights.count("/") != 1 or config.weights.startswith("."):
            raise UserError(f"weights: there is no folder {folder}; give one with {' and '.join(_FILES)}, or a hub id.")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(config.weights, revision=config.revision, allow_patterns=list(_FILES)))
        except Exception as error:  # offline, private, misspelt, unknown revision: huggingface_hub has a class for each, httpx some more
            raise UserError(
                f"weights: {config.weights} is no local folder and could not be fetched from the hub ({type(error).__name__}); "
                "check the spelling, the network and HF_TOKEN, or give a local folder."
            ) from error
    for name in _FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; give a folder with {' and '.join(_FILES)}.")
    return folder
