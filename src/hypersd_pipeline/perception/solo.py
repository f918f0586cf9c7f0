"""mmdet's SOLO and SOLOv2 as perceptual models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from hypersd_pipeline.config import Sha256, Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import address_file, check_sha256, tensors_sha256, write_tensors
from hypersd_pipeline.models.dual_encoder import described, imagenet_normalise, read_checked, resize_images
from hypersd_pipeline.models.tensors import check_finite, check_shapes
from hypersd_pipeline.perception.protocol import COCO_CATEGORY_IDS, Instances, LabelMap, check_batch, pad_to_multiple
from hypersd_pipeline.perception.small_solo import SmallSoloConfig, Variant
from hypersd_pipeline.verdicts import remembered

_FORMAT = "hypersd_pipeline.solo"


class SoloConfig(Strict):
    """mmdet's SOLO (arXiv 1912.04488) or SOLOv2 (arXiv 2003.10152).

    Attributes:
        variant: which of the two. None: what a ``.safetensors`` says, and of mmdet's checkpoints SOLO, the paper's.
        weights: a ``.safetensors`` that ``kedro run --pipelines segmentation_model`` wrote, which says itself how its network is built. Or
            a checkpoint of mmdet's (``.pth``), as a local file or an https address.
        sha256: of the file, or its first digits, eight at least (OpenMMLab writes them into the file's name). Needed with an address,
            checked wherever given.
        mmdet_config: of a checkpoint of mmdet's, a name in mmdet's own ``configs``. None: ResNet-50 with FPN, as the paper has it.
        category_ids: COCO category ids of the checkpoint's classes, class 0 first. None: COCO2017's 80.
    """

    kind: Literal["solo"]
    variant: Variant | None = None
    weights: str = "data/06_models/segmentation_model/model.safetensors"
    sha256: Sha256 | None = None
    mmdet_config: str | None = None
    category_ids: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _address_with_hash(self) -> SoloConfig:
        if self.weights.startswith("http://"):
            raise ValueError("weights: give an https address or a local file")
        if self.weights.startswith("https://") and self.sha256 is None:
            raise ValueError("weights is an address, so sha256 (8 to 64 hexadecimal digits) of its file is needed")
        return self

    def files(self) -> list[Path]:
        """The weights, found, fetched and checked. Raises UserError."""
        path = address_file(self.weights, self.sha256, "weights") if self.weights.startswith("https://") else self._local_file()
        check_sha256(path, self.sha256)
        return [path]

    def _local_file(self) -> Path:
        path = Path(self.weights).expanduser()
        if not path.is_file():
            cure = "run 'kedro run --pipelines segmentation_model' first" if path.suffix == ".safetensors" else "download it there"
            raise UserError(f"{path} is missing; {cure}, or correct weights.")
        return path

    def check(self) -> None:
        """Raises UserError for weights that are missing, damaged or of another network."""
        check_solo(self)

    def load(self, device: torch.device | str) -> Solo:
        """The SOLO that the configuration names, in float32.

        Raises:
            UserError: the weights are missing, are of another network, or would need code to be run to be read.
        """
        return load_solo(self, device)


class Solo(nn.Module):
    """A `PerceptualModel` around mmdet's network, frozen.

    SOLO's head returns other things in ``eval`` mode, so the loss is taken in ``train`` mode. GroupNorm makes that deterministic, and
    BatchNorm, which the published backbones have, always uses and never changes its stored statistics.

    Attributes:
        net: the network. labels: its classes.
        input_size: images are resized to this square for the network. None: they are taken as they are.
    """

    size_divisor = 32

    def __init__(self, net: nn.Module, labels: LabelMap, name: str, input_size: int | None = None) -> None:
        super().__init__()
        self.net, self.labels, self.name, self.input_size = net, labels, name, input_size
        self._batch_norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def loss(self, images: Tensor, instances: Sequence[Instances]) -> Tensor:
        """See `PerceptualModel.loss`: Dice loss of the masks, three times, plus focal loss of the cells' classes."""
        return torch.stack(list(self.loss_terms(images, instances).values())).sum()

    def loss_terms(self, images: Tensor, instances: Sequence[Instances]) -> dict[str, Tensor]:
        """The weighted terms of the loss, ``loss_mask`` and ``loss_cls``."""
        check_batch(images, instances)
        with torch.autocast(images.device.type, enabled=False):
            pixels = self._pixels(images)
            samples = [self._sample(item.to(images.device), images, pixels) for item in instances]
            self._mode(True)
            return self.net.loss(pixels, samples)  # type: ignore[operator]

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[Instances]:
        """See `PerceptualModel.predict`."""
        nothing = [Instances(images.new_zeros(0, *images.shape[-2:], dtype=torch.bool), images.new_zeros(0, dtype=torch.int64))]
        check_batch(images, nothing * len(images))
        pixels = self._pixels(images)
        self._mode(False)
        found = self.net.predict(pixels, [self._sample(nothing[0], images, pixels) for _ in images])  # type: ignore[operator]
        self._mode(True)
        return [Instances(p.masks.bool(), p.labels.long(), p.scores.float()) for p in (sample.pred_instances for sample in found)]

    def _mode(self, training: bool) -> None:
        self.net.train(training)
        for module in self._batch_norms:
            module.eval()

    def _pixels(self, images: Tensor) -> Tensor:
        images = images.float()
        resized = images if self.input_size is None else resize_images(images, self.input_size)
        return pad_to_multiple(imagenet_normalise(resized), self.size_divisor)

    def _sample(self, item: Instances, images: Tensor, pixels: Tensor) -> Any:
        """mmdet's form of the true instances, with masks of the network's input size."""
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        shape, own = tuple(pixels.shape[-2:]), tuple(images.shape[-2:])
        seen = own if self.input_size is None else (self.input_size, self.input_size)
        masks = item.masks
        if seen != own:
            masks = (
                F.interpolate(masks[None].to(torch.uint8), size=seen, mode="nearest-exact")[0] if len(item) else masks.new_zeros(0, *seen)
            )
        masks = F.pad(masks, (0, shape[1] - seen[1], 0, shape[0] - seen[0]))
        bitmaps = BitmapMasks(masks.to(torch.uint8).cpu().numpy(), *shape)
        boxes = bitmaps.get_bboxes("hbox").tensor.to(pixels.device)
        scale = (seen[1] / own[1], seen[0] / own[0])
        sample = DetDataSample(metainfo={"img_shape": seen, "ori_shape": own, "batch_input_shape": shape, "scale_factor": scale})
        sample.gt_instances = InstanceData(masks=bitmaps, labels=item.labels.to(pixels.device), bboxes=boxes)
        return sample


def new_small_solo(config: SmallSoloConfig, labels: LabelMap, seed: int) -> Solo:
    """A small SOLO with fresh weights. PyTorch's global generator is left as it was."""
    from hypersd_pipeline.perception import mmdet_nets

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = mmdet_nets.small_solo(config, len(labels))
    return Solo(net, labels, f"small_{config.variant}", config.input_size)


def save_small_solo(model: Solo, config: SmallSoloConfig, path: Path, recipe: dict[str, Any]) -> None:
    """Write weights with what builds the network, its classes, the weights' hash and the recipe as metadata."""
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in model.net.state_dict().items()}
    metadata = {
        "format": _FORMAT,
        "config": config.model_dump_json(),
        "labels": model.labels.model_dump_json(),
        "sha256": tensors_sha256(tensors),
    }
    write_tensors(path, tensors, {**metadata, "recipe": json.dumps(recipe, sort_keys=True)})


def load_small_solo(path: Path) -> Solo:
    """What `save_small_solo` wrote.

    Raises:
        UserError: the file is missing or damaged, or is no small SOLO.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; run 'kedro run --pipelines segmentation_model' first, or correct weights.")
    tensors, metadata = read_checked(path)
    if metadata.get("format") != _FORMAT:
        raise UserError(
            f"{path}: is no segmentation model of this project; run 'kedro run --pipelines segmentation_model', or correct weights."
        )
    config, labels = described(path, metadata, "config", SmallSoloConfig), described(path, metadata, "labels", LabelMap)
    model = new_small_solo(config, labels, seed=0)
    found, expected = ({name: tuple(v.shape) for name, v in state.items()} for state in (tensors, model.net.state_dict()))
    check_shapes(path, found, expected, "train it again with 'kedro run --pipelines segmentation_model'")
    model.net.load_state_dict(tensors)
    return model


def check_solo(config: SoloConfig) -> None:
    """Raises UserError for weights that `load_solo` would refuse, or that are NaN. Weights that were good are not read again."""
    (path,) = config.files()

    def check() -> bool:
        model = load_solo(config, "cpu")
        check_finite(path, model.state_dict().items())
        return True

    remembered("solo", [path], config.model_dump(mode="json"), check)


def load_solo(config: SoloConfig, device: torch.device | str) -> Solo:
    """See `SoloConfig.load`."""
    (path,) = config.files()
    if path.suffix == ".safetensors":
        model = load_small_solo(path)
        if config.variant is not None and model.name != f"small_{config.variant}":
            raise UserError(f"{path}: holds a {model.name.removeprefix('small_')}, not a {config.variant}; correct variant.")
        return model.to(device)
    return _load_published(config, path).to(device)


def _load_published(config: SoloConfig, path: Path) -> Solo:
    from hypersd_pipeline.perception import mmdet_nets

    tensors = _read_checkpoint(path)
    variant = config.variant or "solo"
    net = mmdet_nets.published_solo(variant, config.mmdet_config)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        name = config.mmdet_config or mmdet_nets.DEFAULT_CONFIG[variant]
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: these are not the weights of mmdet's {name} ({reason}); correct variant, mmdet_config or weights."
        ) from error
    classes = net.mask_head.num_classes  # type: ignore[union-attr]
    ids = config.category_ids or COCO_CATEGORY_IDS
    if len(ids) != classes:
        raise UserError(f"{path}: has {classes} classes, but there are {len(ids)} category_ids; give the category id of each class.")
    names = mmdet_nets.coco_names() if config.category_ids is None else tuple(str(i) for i in ids)
    return Solo(net.float(), LabelMap(category_ids=ids, names=names), f"{variant}_mmdet")


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint of mmdet's. Published ones are stripped to tensors and plain values."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle that wants to run code, or no checkpoint at all
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{path}: cannot be read as tensors and plain values ({type(error).__name__}: {reason}); a checkpoint of a training holds "
            f"objects besides, which are not loaded because they can run code: keep its state_dict only (mmdet's publish_model.py does)."
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no state_dict; give a checkpoint of mmdet's.")
    return dict(content)
