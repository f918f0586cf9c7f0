"""Pixels of every bit depth and colour mode that is read, against values worked out by hand."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersd_pipeline.data.images import MAX_PIXELS, decode_image, fit
from hypersd_pipeline.data.reading import BadFile

RNG = np.random.default_rng(0)
GREY8, RGB8, RGBA8 = (RNG.integers(0, 256, shape, np.uint8) for shape in ((5, 7), (5, 7, 3), (5, 7, 4)))
GREY16, RGB16, RGBA16, LA16 = (RNG.integers(0, 65536, shape, np.uint16) for shape in ((5, 7), (5, 7, 3), (5, 7, 4), (5, 7, 2)))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels: np.ndarray, depth: int, colour: int, *extra: bytes, size: tuple[int, int] | None = None) -> bytes:
    """A PNG written by hand. ``pixels`` ``[h, w]`` or ``[h, w, channels]``."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    if depth == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    elif depth == 8:
        lines = [row.astype(np.uint8).tobytes() for row in rows]
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :].reshape(height, -1)
        lines = [np.packbits(row).tobytes() for row in bits]
    head = struct.pack(">IIBBBBB", *(size or (width, height)), depth, colour, 0, 0, 0)
    body = b"".join(b"\0" + line for line in lines)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(extra) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, 2)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    part = alpha.astype(float)[..., None] / 255
    return colour * part + 255 * (1 - part)


PALETTE = RNG.integers(0, 256, (16, 3), np.uint8)
INDEX = RNG.integers(0, 16, (5, 7), np.uint8)
ALPHAS = RNG.integers(0, 256, 16, np.uint8)
PLTE, TRNS = chunk(b"PLTE", PALETTE.tobytes()), chunk(b"tRNS", ALPHAS.tobytes())
SAME = np.where(np.arange(35).reshape(5, 7) % 3 == 0, 0, 255)  # a transparent colour at every third pixel


def spotted(values: np.ndarray, colour: Any) -> np.ndarray:
    """The pixels with one colour at every third place, and nowhere else."""
    made = np.where(values == 77, 78, values)
    made[SAME == 0] = colour
    return made


MODES: dict[str, tuple[bytes, np.ndarray]] = {
    "grey 1 bit": (png(GREY8 % 2, 1, 0), grey(GREY8 % 2 * 255)),
    "grey 2 bits": (png(GREY8 % 4, 2, 0), grey(GREY8 % 4 * 85)),
    "grey 4 bits": (png(GREY8 % 16, 4, 0), grey(GREY8 % 16 * 17)),
    "grey 8 bits": (png(GREY8, 8, 0), grey(GREY8)),
    "grey 16 bits": (png(GREY16, 16, 0), grey(GREY16 // 256)),
    "grey and alpha 8 bits": (png(RGBA8[..., :2], 8, 4), on_white(grey(RGBA8[..., 0]), RGBA8[..., 1])),
    "grey and alpha 16 bits": (png(LA16, 16, 4), on_white(grey(LA16[..., 0] // 256), LA16[..., 1] // 256)),
    "RGB 8 bits": (png(RGB8, 8, 2), RGB8),
    "RGB 16 bits": (png(RGB16, 16, 2), RGB16 // 256),
    "RGBA 8 bits": (png(RGBA8, 8, 6), on_white(RGBA8[..., :3], RGBA8[..., 3])),
    "RGBA 16 bits": (png(RGBA16, 16, 6), on_white(RGBA16[..., :3] // 256, RGBA16[..., 3] // 256)),
    "palette 1 bit": (png(INDEX % 2, 1, 3, PLTE), PALETTE[INDEX % 2]),
    "palette 4 bits": (png(INDEX, 4, 3, PLTE), PALETTE[INDEX]),
    "palette 8 bits": (png(INDEX, 8, 3, PLTE), PALETTE[INDEX]),
    "palette with alpha": (png(INDEX, 8, 3, PLTE, TRNS), on_white(PALETTE[INDEX], ALPHAS[INDEX])),
    "palette with one transparent": (
        png(INDEX, 4, 3, PLTE, chunk(b"tRNS", b"\xff\0")),
        on_white(PALETTE[INDEX], np.where(INDEX == 1, 0, 255)),
    ),
    "grey 1 bit, 1 transparent": (png(GREY8 % 2, 1, 0, chunk(b"tRNS", b"\0\1")), np.full((5, 7, 3), 255) * (GREY8 % 2)[..., None]),
    "grey 2 bits, 1 transparent": (
        png(GREY8 % 4, 2, 0, chunk(b"tRNS", b"\0\1")),
        on_white(grey(GREY8 % 4 * 85), np.where(GREY8 % 4 == 1, 0, 255)),
    ),
    "grey 4 bits, 5 transparent": (
        png(GREY8 % 16, 4, 0, chunk(b"tRNS", b"\0\5")),
        on_white(grey(GREY8 % 16 * 17), np.where(GREY8 % 16 == 5, 0, 255)),
    ),
    "grey 8 bits, 77 transparent": (png(spotted(GREY8, 77), 8, 0, chunk(b"tRNS", b"\0\x4d")), on_white(grey(spotted(GREY8, 77)), SAME)),
    "grey 16 bits, 300 transparent": (
        png(spotted(GREY16, 300), 16, 0, chunk(b"tRNS", struct.pack(">H", 300))),
        on_white(grey(spotted(GREY16, 300) // 256), SAME),
    ),
    "RGB 8 bits, one transparent": (
        png(spotted(RGB8, 77), 8, 2, chunk(b"tRNS", struct.pack(">HHH", 77, 77, 77))),
        on_white(spotted(RGB8, 77), SAME),
    ),
    "BMP RGB": (saved(Image.fromarray(RGB8), "BMP"), RGB8),
    "BMP grey": (saved(Image.fromarray(GREY8), "BMP"), grey(GREY8)),
    "BMP palette": (saved(Image.fromarray(RGB8).quantize(8), "BMP"), np.asarray(Image.fromarray(RGB8).quantize(8).convert("RGB"))),
    "WebP RGB": (saved(Image.fromarray(RGB8), "WEBP", lossless=True), RGB8),
    "WebP RGBA": (saved(Image.fromarray(RGBA8), "WEBP", lossless=True, exact=True), on_white(RGBA8[..., :3], RGBA8[..., 3])),
}


@pytest.mark.parametrize("mode", MODES)
def test_pixels(mode: str) -> None:
    content, expected = MODES[mode]
    image = decode_image(content)
    assert image.mode == "RGB" and image.size == (7, 5)
    tolerance = 1 if "alpha" in mode or "RGBA" in mode else 0  # rounding of the mixture with white
    assert np.abs(np.asarray(image).astype(float) - expected).max() <= tolerance


def flat(colour: Any, mode: str) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


JPEGS = {
    "grey": (flat(100, "L"), (100, 100, 100)),
    "YCbCr of RGB": (flat((200, 60, 30), "RGB"), (200, 60, 30)),
    "CMYK without ink": (flat((0, 0, 0, 0), "CMYK"), (255, 255, 255)),
    "CMYK cyan": (flat((255, 0, 0, 0), "CMYK"), (0, 255, 255)),
    "CMYK dark red": (flat((0, 200, 200, 50), "CMYK"), (205, 205 * 55 / 255, 205 * 55 / 255)),
    "CMYK black": (flat((0, 0, 0, 255), "CMYK"), (0, 0, 0)),
}


@pytest.mark.parametrize("name", JPEGS)
def test_jpeg_colours(name: str) -> None:
    image, colour = JPEGS[name]
    pixels = np.asarray(decode_image(saved(image, "JPEG", quality=100))).astype(float)
    assert np.abs(pixels - colour).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_turned_camera_is_turned_back(orientation: int, kind: str) -> None:
    quarters = np.array([[10, 90], [170, 250]], np.uint8)
    upright = grey(np.kron(quarters, np.ones((8, 16), np.uint8)))
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.swapaxes(0, 1), 6: np.rot90(upright, 1), 7: np.rot90(upright, 1)[::-1, ::-1].swapaxes(0, 1)[::-1, ::-1][:, ::-1],
        8: np.rot90(upright, -1),
    }  # fmt: skip
    if orientation == 7:
        stored[7] = upright[::-1, ::-1].swapaxes(0, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    image = decode_image(saved(Image.fromarray(np.ascontiguousarray(stored[orientation])), kind, exif=exif, **options))
    assert np.abs(np.asarray(image).astype(int) - upright).max() <= 4


# --- ICC profiles ------------------------------------------------------------------------------------------------------------------------


def profile(gamma: float, space: bytes = b"RGB ", swapped: bool = False, name: bytes = b"by hand") -> bytes:
    """A small ICC profile: sRGB's own primaries (red and blue exchanged on demand), or grey, with a power as tone curve."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    red, green, blue = (0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" * 80
    tags = {b"desc": text, b"wtpt": xyz(0.9642, 1.0, 0.8249), b"cprt": b"text\0\0\0\0free\0"}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        first, last = (blue, red) if swapped else (red, blue)
        tags |= {b"rXYZ": xyz(*first), b"gXYZ": xyz(*green), b"bXYZ": xyz(*last), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    body, table, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += tag + struct.pack(">II", offset + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", offset + len(body), b"\0\0\0\0", 0x02100000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def srgb(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


RAMP = np.stack([np.arange(0, 256, 5, dtype=np.uint8)] * 4)


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.6])
def test_a_profile_is_applied(gamma: float) -> None:
    colours = np.stack([RAMP, RAMP[:, ::-1], RAMP], -1)
    expected = srgb((colours / 255) ** gamma)
    image = decode_image(saved(Image.fromarray(colours), "PNG", icc_profile=profile(gamma)))
    assert np.abs(np.asarray(image) - expected).max() <= 3
    swapped = decode_image(saved(Image.fromarray(colours), "PNG", icc_profile=profile(gamma, swapped=True)))
    assert np.abs(np.asarray(swapped) - expected[..., ::-1]).max() <= 3


def test_a_profile_of_a_grey_image_is_applied() -> None:
    expected = grey(srgb(RAMP / 255))
    for icc in (profile(1.0, b"GRAY"), profile(1.0)):
        image = decode_image(saved(Image.fromarray(RAMP), "PNG", icc_profile=icc))
        assert np.abs(np.asarray(image) - expected).max() <= 3


def test_a_profile_leaves_opacity_alone() -> None:
    colours = np.stack([RAMP, RAMP, RAMP, np.full_like(RAMP, 51)], -1)
    image = decode_image(saved(Image.fromarray(colours), "PNG", icc_profile=profile(1.0)))
    assert np.abs(np.asarray(image) - on_white(grey(srgb(RAMP / 255)), colours[..., 3])).max() <= 3


def test_srgbs_own_profile_changes_nothing() -> None:
    from PIL import ImageCms

    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(np.asarray(decode_image(saved(Image.fromarray(RGB8), "PNG", icc_profile=icc))), RGB8)


# --- what is refused ---------------------------------------------------------------------------------------------------------------------

ANIMATION = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"
REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "zero bytes"),
    "text": (b"no image at all", "no known image format"),
    "EPS": (EPS, "the image is EPS, which is not read"),
    "PDF": (b"%PDF-1.7\n", "the image is PDF, which is not read"),
    "GIF": (saved(ANIMATION[0], "GIF"), "the image is GIF, which is not read; convert it"),
    "TIFF": (saved(ANIMATION[0], "TIFF"), "the image is TIFF"),
    "AVIF": (b"\0\0\0\x20ftypavif" + b"\0" * 20, "the image is AVIF"),
    "HEIC": (b"\0\0\0\x18ftypheic" + b"\0" * 20, "the image is HEIC"),
    "ICO": (saved(ANIMATION[0], "ICO"), "the image is ICO"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "the image is SVG"),
    "PPM": (saved(ANIMATION[0], "PPM"), "no known image format"),
    "TGA": (saved(ANIMATION[0], "TGA"), "no known image format"),
    "a very wide PNG": (png(np.zeros((1, 1), np.uint8), 1, 0, size=(1_000_000, 1)), "1000000x1, so one side is more than 16 times"),
    "a very high PNG": (png(np.zeros((1, 1), np.uint8), 1, 0, size=(2, 33)), "2x33, so one side is more than 16 times"),
    "a bomb": (png(np.zeros((1, 1), np.uint8), 1, 0, size=(12_000, 12_000)), f"more than {MAX_PIXELS} pixels"),
    "a large bomb": (png(np.zeros((1, 1), np.uint8), 1, 0, size=(60_000, 60_000)), f"more than {MAX_PIXELS} pixels"),
    "no width": (png(np.zeros((1, 1), np.uint8), 1, 0, size=(0, 5)), "image"),
    "an animated WebP": (
        saved(ANIMATION[0], "WEBP", save_all=True, append_images=ANIMATION[1:]),
        "an animation of 3 frames; save one of them",
    ),
    "an animated PNG": (saved(ANIMATION[0], "PNG", save_all=True, append_images=ANIMATION[1:]), "an animation of 3 frames"),
    "16 bits with a transparent colour": (
        png(RGB16, 16, 2, chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))),
        "16 bits and one transparent colour",
    ),
    "a damaged profile": (saved(ANIMATION[0], "PNG", icc_profile=b"no profile"), "ICC profile cannot be read"),
    "a profile for grey": (saved(ANIMATION[0], "PNG", icc_profile=profile(1.0, b"GRAY")), "its ICC profile is for GRAY"),
    "a profile of RGB on CMYK": (saved(flat((0, 9, 9, 9), "CMYK"), "JPEG", icc_profile=profile(1.0)), "the image is CMYK, but its ICC"),
    "a cut PNG": (saved(Image.fromarray(RNG.integers(0, 256, (90, 90, 3), np.uint8)), "PNG")[:9000], "the image cannot be read"),
    "a cut JPEG": (saved(Image.fromarray(RNG.integers(0, 256, (90, 90, 3), np.uint8)), "JPEG")[:1500], "the image cannot be read"),
    "a cut WebP": (saved(Image.fromarray(RNG.integers(0, 256, (90, 90, 3), np.uint8)), "WEBP")[:1500], "image"),
    "a PNG with a wrong checksum": (MODES["RGB 8 bits"][0].replace(b"IDAT", b"IDAT\0", 1), "image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str) -> None:
    content, reason = REFUSED[name]
    with pytest.raises(BadFile) as refusal:
        decode_image(content)
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


def test_ghostscript_is_never_started(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a program was started"))
    with pytest.raises(BadFile):
        decode_image(EPS)


def test_a_cameras_preview_is_not_the_image() -> None:
    large, small = Image.new("RGB", (32, 16), (10, 200, 90)), Image.new("RGB", (8, 4), "red")
    image = decode_image(saved(large, "MPO", save_all=True, append_images=[small], quality=100))
    assert image.size == (32, 16) and np.abs(np.asarray(image).astype(int) - (10, 200, 90)).max() <= 3


def test_resizing_is_bounded() -> None:
    pixels, (top, left) = fit(decode_image(saved(Image.new("RGB", (160, 10), "red"), "PNG")), 64)
    assert pixels.shape == (64, 64, 3) and (top, left) == (0, 480)
