"""Reading images and bringing them to the teacher's size.

Read are PNG, JPEG, WebP and BMP, told by their content and not by their names. What cannot be converted to 8-bit sRGB rightly is refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from hypersd_pipeline.data.reading import BadFile, printable, read_inside
from hypersd_pipeline.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_BYTES = 2**28
MAX_PIXELS = 89_478_485  # Pillow's own bound, above which it warns
MAX_RATIO = 16  # of the sides: the shorter one is brought to the teacher's resolution, so the longer one must be bounded

_TURNED = (5, 6, 7, 8)  # values of EXIF's orientation that exchange width and height

_SIGNATURES = (
    (0, b"GIF8", "GIF"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"%!PS", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"8BPS", "PSD"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "SVG"),
)


def decode_image(content: bytes) -> Image.Image:
    """The image as 8-bit sRGB, upright (EXIF), transparency on white. Every pixel is decoded, so a truncated file raises.

    Of 16 bits the upper 8 are kept. An ICC profile is applied where it is not sRGB's own.

    Raises:
        BadFile: the content is no image of `FORMATS`, is damaged, too large or an animation, or cannot be converted rightly.
    """
    with _opened(content) as opened:
        opened.load()
        upright = ImageOps.exif_transpose(opened)
        return _srgb(upright, _png_depth(content))


def image_size(content: bytes) -> tuple[int, int]:
    """Width and height of the upright image, from its header. No pixel is decoded, so a truncated file may have a size.

    Raises:
        BadFile: see `decode_image`, as far as the header tells.
    """
    with _opened(content) as opened:
        width, height = opened.size
        return (height, width) if opened.getexif().get(ExifTags.Base.Orientation) in _TURNED else (width, height)


@contextmanager
def _opened(content: bytes) -> Iterator[ImageFile.ImageFile]:
    """An image whose header was checked. Raises BadFile for it, and for what is raised inside."""
    if not content:
        raise BadFile("the image cannot be read (the file has zero bytes)")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            _check_header(opened)
            yield opened
    except BadFile:
        raise
    except UnidentifiedImageError:
        raise BadFile(_unknown(content)) from None
    except Image.DecompressionBombError:
        raise BadFile(f"the image has more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # decoders raise whatever they like on broken content
        reason = printable(str(error) or type(error).__name__, 120)
        raise BadFile(f"the image cannot be read ({reason})") from None


def load_image(path: Path) -> Image.Image:
    """:func:`decode_image` of a file that was good when the rows were validated.

    Raises:
        UserError: it has gone, or is good no longer.
    """
    try:
        return decode_image(read_inside(path.parent, path.name, MAX_BYTES))
    except BadFile as fault:
        raise UserError(f"{path}: {fault}; put the file back, or run data_prep again (kedro run --pipelines data_prep).") from None


def fit(image: Image.Image, size: int | tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize (bicubic, antialiased) until the image covers ``size``, then cut out the centre.

    Args:
        size: height and width, or the side of a square.

    Returns:
        uint8 ``[h, w, 3]``, and the crop's ``(top, left)`` in the resized image, as SDXL's size conditioning wants it.
    """
    h, w = (size, size) if isinstance(size, int) else size
    scale = max(h / image.height, w / image.width)
    width, height = max(w, round(image.width * scale)), max(h, round(image.height * scale))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - h) // 2, (width - w) // 2
    return np.array(image.crop((left, top, left + w, top + h))), (top, left)


# --- before decoding ---------------------------------------------------------------------------------------------------------------------


def _check_header(opened: Image.Image) -> None:
    """Raises BadFile for a size or a kind that is not decoded."""
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise BadFile(f"the image is {width}x{height}, which is more than {MAX_PIXELS} pixels")
    if width < 1 or height < 1 or max(width, height) > MAX_RATIO * min(width, height):
        raise BadFile(f"the image is {width}x{height}, so one side is more than {MAX_RATIO} times the other")
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format != "MPO":  # MPO is a camera's JPEG with a preview behind the image
        raise BadFile(f"the image is an animation of {frames} frames; save one of them")


def _unknown(content: bytes) -> str:
    for start, signature, name in _SIGNATURES:
        if content[start : start + len(signature)] == signature:
            return f"the image is {name}, which is not read; convert it to PNG, JPEG, WebP or BMP"
    return "the image cannot be read (no known image format)"


# --- colours -----------------------------------------------------------------------------------------------------------------------------


def _png_depth(content: bytes) -> int:
    """Bits of a channel of a PNG; 8 for other formats."""
    return content[24] if content.startswith(b"\x89PNG") else 8


def _srgb(image: Image.Image, depth: int) -> Image.Image:
    colour, alpha = _colour_and_alpha(image, depth)
    colour = _through_profile(colour, image.info.get("icc_profile"))
    if alpha is None:
        return colour
    colour.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")


def _colour_and_alpha(image: Image.Image, depth: int) -> tuple[Image.Image, Image.Image | None]:
    """The image in 8 bits as L, RGB or CMYK, and its opacity.

    Raises:
        BadFile: its mode cannot be converted.
    """
    mode, transparent = image.mode, image.info.get("transparency")
    if mode in ("RGBA", "LA"):
        return image.convert("RGB" if mode == "RGBA" else "L"), image.getchannel("A")
    if mode == "P":
        if transparent is None:
            return image.convert("RGB"), None
        full = image.convert("RGBA")
        return full.convert("RGB"), full.getchannel("A")
    if mode == "I;16":
        values = np.asarray(image)
        return Image.fromarray((values >> 8).astype(np.uint8)), _opaque(values, transparent)
    if mode in ("1", "L"):
        grey = image.convert("L")
        if transparent is not None and depth in (2, 4):  # Pillow scales the pixels to 8 bits, but not this
            transparent = transparent * 255 // (2**depth - 1)
        return grey, _opaque(np.asarray(grey), transparent)
    if mode == "RGB":
        if transparent is not None and depth == 16:
            raise BadFile("the image has 16 bits and one transparent colour, which 8 bits cannot tell; save it with an alpha channel")
        return image, _opaque(np.asarray(image), transparent)
    if mode == "CMYK":
        return image, None
    raise BadFile(f"the image has the mode {mode}, which is not read; save it as RGB")


def _opaque(values: np.ndarray, transparent: Any) -> Image.Image | None:
    """255 where a pixel is not the transparent colour."""
    if transparent is None:
        return None
    same = values == np.asarray(transparent)
    return Image.fromarray(np.where(same.all(-1) if values.ndim == 3 else same, 0, 255).astype(np.uint8))


def _through_profile(colour: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB. An RGB profile on a grey image is applied to equal channels.

    Raises:
        BadFile: the profile is damaged, or is for other colours than the image's.
    """
    if not profile:
        return colour.convert("RGB")
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space, name = opened.profile.xcolor_space.strip(), ImageCms.getProfileDescription(opened)
    except Exception:  # ImageCms has a class of its own, and lets others through
        raise BadFile("the image's ICC profile cannot be read; remove it or save the image as sRGB") from None
    if space == "RGB" and colour.mode == "L":
        colour = colour.convert("RGB")
    if space != {"L": "GRAY"}.get(colour.mode, colour.mode):
        raise BadFile(f"the image is {colour.mode}, but its ICC profile is for {space}; remove it or save the image as sRGB")
    if space == "RGB" and "srgb" in name.lower():
        return colour
    precise = ImageCms.Flags.HIGHRESPRECALC  # without it dark tones of grey profiles are off by seven levels
    converted = ImageCms.profileToProfile(colour, opened, ImageCms.createProfile("sRGB"), outputMode="RGB", flags=precise)
    assert converted is not None  # None is for inPlace only
    return converted
