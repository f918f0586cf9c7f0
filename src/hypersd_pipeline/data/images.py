"""Reading pictures and bringing them to the teacher's size."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps


def decode_image(content: bytes) -> Image.Image:
    """The picture as RGB, upright (EXIF), transparency on white; every pixel is decoded, so a truncated file raises.

    Raises:
        Exception: whatever the decoder raises on broken content.
    """
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, resolution: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Shorter side to ``resolution`` (bicubic, antialiased), then the centre square.

    Returns:
        uint8 ``[resolution, resolution, 3]``, and the crop's ``(top, left)`` in the resized picture, as SDXL's size conditioning wants it.
    """
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - resolution) // 2, (width - resolution) // 2
    return np.array(image.crop((left, top, left + resolution, top + resolution))), (top, left)
