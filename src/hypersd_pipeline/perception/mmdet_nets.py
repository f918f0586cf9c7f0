"""mmdet's networks. Importing this module imports mmdet, which takes seconds: do it where one is built, not at the top of a module."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.perception import mmcv_stub
from hypersd_pipeline.perception.small_solo import SmallSoloConfig, Variant

mmcv_stub.install()

import mmdet.models  # noqa: E402  # registers the networks
from mmdet.models.losses import FocalLoss  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402

warnings.filterwarnings("ignore", message="torch.meshgrid")  # said of mmdet's coordinates, once a process

DEFAULT_CONFIG = {"solo": "solo/solo_r50_fpn_3x_coco.py", "solov2": "solov2/solov2_r50_fpn_ms-3x_coco.py"}
TYPES = {"solo": "SOLO", "solov2": "SOLOv2"}


@MODELS.register_module()
class OneHotFocalLoss(FocalLoss):
    """mmdet's focal loss on one-hot targets: the same value, but on CUDA too it asks for no compiled operator."""

    def forward(self, pred: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``pred`` ``[n, classes]``, ``target`` int64 ``[n]`` with ``classes`` for background."""
        return super().forward(pred, F.one_hot(target, pred.size(1) + 1)[:, : pred.size(1)], *args, **kwargs)


def _build(model: Any, initialise: bool) -> nn.Module:
    model.mask_head.loss_cls.type = "OneHotFocalLoss"
    logger = MMLogger.get_current_instance()
    logger.setLevel(logging.ERROR)  # it reports how each layer was initialised
    network = MODELS.build(model)
    if initialise:
        network.init_weights()
    return network


def small_solo(config: SmallSoloConfig, classes: int) -> nn.Module:
    """A small SOLO with fresh weights, drawn from PyTorch's global generator."""
    norm = {"type": "GN", "num_groups": config.groups}
    base, width = config.base_channels, config.feat_channels
    head: dict[str, Any] = {
        "type": "SOLOHead" if config.variant == "solo" else "SOLOV2Head",
        "num_classes": classes, "in_channels": width, "feat_channels": width, "stacked_convs": config.stacked_convs,
        "strides": [8, 8, 8],  # all three levels are brought to stride 8 before the head
        "scale_ranges": config.scale_ranges, "num_grids": list(config.num_grids), "pos_scale": 0.2, "cls_down_index": 0, "norm_cfg": norm,
        "loss_mask": {"type": "DiceLoss", "use_sigmoid": True, "loss_weight": 3.0}, "loss_cls": {"type": "FocalLoss"},
    }  # fmt: skip
    if config.variant == "solov2":
        head["mask_feature_head"] = {
            "feat_channels": width, "start_level": 0, "end_level": 2, "out_channels": width, "mask_stride": 4, "norm_cfg": norm,
        }  # fmt: skip
    model = {
        "type": TYPES[config.variant],
        "backbone": {
            "type": "ResNet", "depth": 18, "base_channels": base, "stem_channels": base, "num_stages": 3, "strides": (1, 2, 2),
            "dilations": (1, 1, 1), "out_indices": (0, 1, 2), "frozen_stages": -1, "norm_cfg": norm, "norm_eval": False,
        },
        "neck": {"type": "FPN", "in_channels": [base, 2 * base, 4 * base], "out_channels": width, "num_outs": 3},
        "mask_head": head,
        "test_cfg": {
            "nms_pre": 100, "score_thr": config.score_threshold, "mask_thr": 0.5, "filter_thr": config.score_threshold,
            "kernel": "gaussian", "sigma": 2.0, "max_per_img": config.max_per_image,
        },
    }  # fmt: skip
    return _build(Config(model), initialise=True)


def published_solo(variant: Variant, name: str | None) -> nn.Module:
    """A network as mmdet's own configuration builds it, uninitialised.

    Args:
        name: in mmdet's ``configs``. None: ResNet-50 with FPN.

    Raises:
        UserError: there is no such configuration, or it is of another network.
    """
    name = name or DEFAULT_CONFIG[variant]
    folder = Path(mmdet.__file__).parent / ".mim" / "configs"
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():  # a configuration is Python code: only mmdet's own is run
        raise UserError(f"mmdet_config: mmdet has no configuration '{name}'; give one of its configs/solo or configs/solov2.")
    model = Config.fromfile(path).model
    if model.type != TYPES[variant]:
        raise UserError(f"mmdet_config: '{name}' is of the network {model.type}, not {TYPES[variant]}; correct it or variant.")
    model.pop("data_preprocessor")  # its normalisation, ImageNet's, is done where gradients pass
    model.backbone.init_cfg = None  # or the backbone is downloaded, to be overwritten
    return _build(model, initialise=False)


def coco_names() -> tuple[str, ...]:
    """The names of COCO2017's 80 classes, in their order."""
    from mmdet.datasets import CocoDataset

    return CocoDataset.METAINFO["classes"]
