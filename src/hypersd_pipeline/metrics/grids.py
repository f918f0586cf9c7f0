"""Labelled grids of images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LABEL_WIDTH = 190
HEADER = 22
GAP = 4


def to_pil(image: Tensor) -> Image.Image:
    """``[3, h, w]`` in [0, 1] to an 8-bit image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def labelled_grid(columns: Sequence[tuple[str, Sequence[Image.Image]]], prompts: Sequence[str], cell: int = 128) -> Image.Image:
    """Rows are prompts, written at the left. Columns have their name above them. Cells are ``cell`` pixels, enlarged without smoothing."""
    width = LABEL_WIDTH + len(columns) * (cell + GAP)
    grid = Image.new("RGB", (width, HEADER + len(prompts) * (cell + GAP)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=12)
    for row, prompt in enumerate(prompts):
        text = "\n".join(textwrap.wrap(prompt, LABEL_WIDTH // 7)[: cell // 16])
        draw.multiline_text((4, HEADER + row * (cell + GAP) + 4), text, fill="black", font=font)
    for column, (name, images) in enumerate(columns):
        x = LABEL_WIDTH + column * (cell + GAP)
        draw.text((x + cell // 2, HEADER // 2), name, fill="black", font=font, anchor="mm")
        for row, image in enumerate(images[: len(prompts)]):
            resample = Image.Resampling.NEAREST if image.width <= cell else Image.Resampling.LANCZOS
            grid.paste(image.convert("RGB").resize((cell, cell), resample), (x, HEADER + row * (cell + GAP)))
    return grid


def captioned_grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8, cell: int = 128) -> Image.Image:
    """Images in reading order, each with its caption under it."""
    lines, line_height = 4, 13
    height = cell + lines * line_height + GAP
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (cell + GAP), rows * height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=10)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * (cell + GAP), i // columns * height
        grid.paste(image.convert("RGB").resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + cell), "\n".join(textwrap.wrap(caption, cell // 5)[:lines]), fill="black", font=font, spacing=1)
    return grid
