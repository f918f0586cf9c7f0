"""Reader of COCO-format folders (COCO2017 itself, or the embedded scenes), and the checks of COCO instance masks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypersd_pipeline.data.config import CocoSource
from hypersd_pipeline.data.rows import RawRow, Rejected
from hypersd_pipeline.errors import UserError

TOLERANCE = 1.0  # pixels: COCO's own polygons and boxes touch and round over the border


def read_coco(source: CocoSource, root: Path, split: str) -> Iterator[RawRow | Rejected]:
    """Rows of one split, in the order of the captions file's ``images``; several captions per image are kept together.

    Args:
        split: the source's own name, such as ``train2017``.

    Raises:
        UserError: an annotation file is missing or is no COCO file.
    """
    captions_file = source.captions.format(split=split)
    content = _load(root / captions_file)
    captions, orphans = _by_image(content["annotations"], {_id(image) for image in content["images"]}, captions_file)
    yield from orphans
    instances: dict[str, list[Any]] = {}
    if source.instances is not None:
        file = source.instances.format(split=split)
        found = _load(root / file)
        instances, orphans = _by_image(found["annotations"], {_id(image) for image in [*content["images"], *found["images"]]}, file)
        yield from orphans
    folder = source.images.format(split=split)
    for number, image in enumerate(content["images"]):
        key = _id(image)
        if key is None:
            yield Rejected(captions_file, f"images[{number}]", "the image has no id")
            continue
        size = (image["width"], image["height"]) if {"width", "height"} <= image.keys() else None
        texts = [annotation.get("caption") for annotation in captions.get(key, [])]
        yield RawRow(f"image {key}", key, folder, image.get("file_name"), texts, size, instances.get(key, ()))


def _load(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; check root, captions, instances and splits under data.source.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch the file again.") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("images", "annotations")):
        raise UserError(f"{path} has no lists 'images' and 'annotations'; give a COCO captions or instances file.")
    return content


def _id(image: Any) -> str | None:
    return str(image["id"]) if isinstance(image, dict) and image.get("id") is not None else None


def _by_image(annotations: list[Any], known: set[str | None], file: str) -> tuple[dict[str, list[Any]], list[Rejected]]:
    """Annotations by image id, and those that belong to no image."""
    grouped: dict[str, list[Any]] = defaultdict(list)
    orphans: list[Rejected] = []
    for number, annotation in enumerate(annotations):
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if image_id is None or str(image_id) not in known:
            orphans.append(Rejected(file, f"annotations[{number}]", f"its image_id {image_id!r} is not among the images"))
        else:
            grouped[str(image_id)].append(annotation)
    return grouped, orphans


def mask_fault(instance: Any, width: int, height: int) -> str | None:
    """What is wrong with an instance's ``segmentation`` and ``bbox`` on an image of this size, in pixels; None if nothing is.

    Polygons must lie inside the image; RLE (COCO's crowds, plain or compressed) must have the image's size and cover it exactly.
    """
    if not isinstance(instance, dict):
        return "an instance is no object"
    box = instance.get("bbox")
    if box is not None and not _box_inside(box, width, height):
        return f"the box {box} is outside the {width}x{height} image"
    segmentation = instance.get("segmentation")
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, width, height)
    if not isinstance(segmentation, list) or not segmentation:
        return "an instance has no mask"
    faults = (_polygon_fault(polygon, width, height) for polygon in segmentation)
    return next((fault for fault in faults if fault), None)


def _box_inside(box: Any, width: int, height: int) -> bool:
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        return False
    x, y, w, h = box
    inside = x >= -TOLERANCE and y >= -TOLERANCE and x + w <= width + TOLERANCE and y + h <= height + TOLERANCE
    return inside and w >= 0 and h >= 0


def _polygon_fault(polygon: Any, width: int, height: int) -> str | None:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(isinstance(v, int | float) for v in polygon):
        return "a mask polygon is not a list of three or more x, y pairs"
    inside_x = all(-TOLERANCE <= x <= width + TOLERANCE for x in polygon[::2])
    inside_y = all(-TOLERANCE <= y <= height + TOLERANCE for y in polygon[1::2])
    return None if inside_x and inside_y else f"a mask polygon is outside the {width}x{height} image"


def _rle_fault(rle: dict[str, Any], width: int, height: int) -> str | None:
    if rle.get("size") != [height, width]:
        return f"a mask is outside the image: its RLE size is {rle.get('size')}, the image's is {[height, width]} (height, width)"
    counts = rle.get("counts")
    try:
        runs: Any = _decode_runs(counts) if isinstance(counts, str) else counts
    except (IndexError, ValueError):
        runs = None
    if not isinstance(runs, list) or not all(isinstance(run, int) and run >= 0 for run in runs):
        return "a mask's RLE counts cannot be read"
    if sum(runs) != width * height:
        return f"a mask is outside the image: its RLE covers {sum(runs)} pixels, the image has {width * height}"
    return None if sum(runs[1::2]) else "a mask is empty"


def _decode_runs(counts: str) -> list[int]:
    """Run lengths of COCO's compressed RLE: 5 bits a character, little end first, differences to the run before last."""
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value, shift, more = 0, 0, True
        while more:
            code = ord(counts[position]) - 48
            if not 0 <= code < 64:
                raise ValueError("not a character of compressed RLE")
            value |= (code & 0x1F) << shift
            more, shift, position = bool(code & 0x20), shift + 5, position + 1
            if not more and code & 0x10:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs
