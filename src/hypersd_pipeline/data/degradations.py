"""What makes a clean image worse: the losers of clean-against-degraded pairs."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

Degradation = Callable[[Image.Image, np.random.Generator], Image.Image]
"""An RGB image and a source of random numbers -> a worse RGB image of the same size."""


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.7, 2.5)))


def _noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    return Image.fromarray((pixels + rng.normal(0, rng.uniform(8, 45), pixels.shape)).clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(3, 25)))
    return Image.open(buffer, formats=["JPEG"]).convert("RGB")


def _colour_shift(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Smooth blotches of colour: what a wrong latent decodes to."""
    low = rng.normal(0, rng.uniform(20, 60), (4, 4, 3))
    field = np.stack(
        [np.asarray(Image.fromarray(low[..., c].astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)) for c in range(3)], -1
    )
    return Image.fromarray((np.asarray(image, np.float32) + field).clip(0, 255).astype(np.uint8))


def _swap_patches(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Exchange blocks of an eighth or a quarter of the side: broken shapes with clean texture."""
    pixels = np.array(image)
    side = image.size[0] // int(rng.choice([4, 8]))
    for _ in range(int(rng.integers(2, 9))):
        (y0, x0), (y1, x1) = (rng.integers(0, image.size[0] // side, 2) * side for _ in range(2))
        block = pixels[y0 : y0 + side, x0 : x0 + side].copy()
        pixels[y0 : y0 + side, x0 : x0 + side] = pixels[y1 : y1 + side, x1 : x1 + side]
        pixels[y1 : y1 + side, x1 : x1 + side] = block
    return Image.fromarray(pixels)


def _half_resolution(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = image.size
    method = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR)[int(rng.integers(2))]
    return image.resize((width // 2, height // 2), Image.Resampling.BOX).resize((width, height), method)


DEGRADATIONS: dict[str, Degradation] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "colour_shift": _colour_shift,
    "patch_swap": _swap_patches,
    "half_resolution": _half_resolution,
}


def degrade(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
    """One random degradation of each image.

    Args:
        images: uint8 ``[n, 3, h, w]``.
        rng: source of every draw.

    Returns:
        uint8 ``[n, 3, h, w]``, each of which differs from its image, and the names of the degradations (keys of `DEGRADATIONS`).
    """
    out, names = [], []
    for image in images.permute(0, 2, 3, 1).numpy():
        name = list(DEGRADATIONS)[int(rng.integers(len(DEGRADATIONS)))]
        worse = np.asarray(DEGRADATIONS[name](Image.fromarray(image), rng))
        while np.array_equal(worse, image):  # patches of plain background
            worse = np.asarray(_noise(Image.fromarray(image), rng))
            name = "noise"
        out.append(worse)
        names.append(name)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2), names
