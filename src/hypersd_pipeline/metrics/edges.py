"""Edges of images: what a ControlNet is conditioned on, and how closely a sample keeps to it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hypersd_pipeline.errors import UserError

Detector = Literal["canny", "scribble"]
"""``canny``: thin edges with all details. ``scribble``: the edges of a blurred image, as thick lines."""

LOW, HIGH = 100, 200  # Canny's thresholds in the published ControlNets' code
BLUR, WIDTH = 1 / 40, 1 / 21  # of the image's side: the blur's deviation before a scribble, and the width of its lines


def check_opencv(key: str) -> None:
    """Raises UserError naming the configuration key where OpenCV is not installed."""
    if find_spec("cv2") is None:
        raise UserError(f"{key}: OpenCV is not installed; install it with pip install 'hypersd-pipeline[compatibility]'.")


def edges_of(image: Tensor, detector: Detector) -> Tensor:
    """Thin edges of ``[3, h, w]`` in [0, 1], bool ``[h, w]``: OpenCV's Canny, for a scribble after a Gaussian blur."""
    import cv2

    pixels: Any = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    low, high = LOW, HIGH
    if detector == "scribble":
        pixels = cv2.GaussianBlur(pixels, (0, 0), BLUR * pixels.shape[0])
        low, high = LOW // 2, HIGH // 2  # the blur has lowered all gradients
    return torch.from_numpy(cv2.Canny(np.ascontiguousarray(pixels), low, high) > 0)


def condition_of(edges: Tensor, detector: Detector) -> Tensor:
    """What the ControlNet sees of thin edges ``[h, w]``: white lines on black, float32 ``[3, h, w]`` in {0, 1}."""
    thick = edges if detector == "canny" else grown(edges, max(1, round(WIDTH * len(edges) / 2)))
    return thick.float().expand(3, *edges.shape)


def grown(edges: Tensor, pixels: int) -> Tensor:
    """The pixels of ``[h, w]`` that are at most so many columns and rows away from an edge."""
    side = 2 * pixels + 1
    return torch.nn.functional.max_pool2d(edges[None, None].float(), side, 1, pixels)[0, 0] > 0


def edge_f1(found: Tensor, wanted: Tensor, tolerance: int) -> float:
    """F1 of the edges of a sample against those that were asked for, both bool ``[h, w]``.

    Precision is the share of found edges that are within ``tolerance`` pixels of a wanted one. Recall is the share of wanted edges that are
    within ``tolerance`` pixels of a found one. Two images without edges agree: 1. If only one has edges, it is 0.
    """
    if not bool(found.any()) or not bool(wanted.any()):
        return float(not bool(found.any()) and not bool(wanted.any()))
    precision = float(grown(wanted, tolerance)[found].float().mean())
    recall = float(grown(found, tolerance)[wanted].float().mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
