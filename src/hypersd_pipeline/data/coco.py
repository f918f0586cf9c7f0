"""Reader of COCO-format folders (COCO2017 itself, or the embedded scenes), and the checks of COCO instance masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypersd_pipeline.data.config import CocoSource
from hypersd_pipeline.data.reading import MAX_JSON, BadFile, decode_text, is_text, parse_json, read_inside, shown
from hypersd_pipeline.data.rows import RawRow, Rejected
from hypersd_pipeline.errors import UserError

LARGEST = 2**31
TOLERANCE = 1.0  # pixels: COCO's own polygons and boxes touch and round over the border


def read_coco(source: CocoSource, root: Path, split: str) -> Iterator[RawRow | Rejected]:
    """Rows of one split, in the order of the captions file's ``images``. Several captions per image are kept together.

    Args:
        split: the source's own name, such as ``train2017``.

    Raises:
        UserError: an annotation file is missing or is no COCO file.
    """
    captions_file = source.captions.format(split=split)
    content = _load(root, captions_file)
    captions, orphans = _by_image(content["annotations"], {_id(image) for image in content["images"]}, captions_file)
    yield from orphans
    instances: dict[str, list[Any]] = {}
    if source.instances is not None:
        file = source.instances.format(split=split)
        found = _load(root, file)
        instances, orphans = _by_image(found["annotations"], {_id(image) for image in [*content["images"], *found["images"]]}, file)
        yield from orphans
    folder = source.images.format(split=split)
    for number, image in enumerate(content["images"]):
        key = _id(image)
        if key is None:
            yield Rejected(captions_file, f"images[{number}]", "the image has no id, or one that is neither a whole number nor text")
            continue
        size = (image["width"], image["height"]) if {"width", "height"} <= image.keys() else None
        texts = [annotation.get("caption") for annotation in captions.get(key, [])]
        yield RawRow(f"image {key}", key, folder, image.get("file_name"), texts, size, instances.get(key, ()))


def _load(root: Path, file: str) -> dict[str, list[Any]]:
    path = root / file
    try:
        raw = read_inside(root, file, MAX_JSON)
    except BadFile as fault:
        if not path.exists():
            raise UserError(f"{path} is missing; check root, captions, instances and splits under data.source.") from None
        raise UserError(f"{path}: {fault}; check root, captions, instances and splits under data.source.") from None
    try:
        content = parse_json(decode_text(raw))
    except BadFile as fault:
        raise UserError(f"{path} is not valid JSON ({fault}); fetch the file again.") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("images", "annotations")):
        raise UserError(f"{path} has no lists 'images' and 'annotations'; give a COCO captions or instances file.")
    return content


def _id(image: Any) -> str | None:
    return _id_text(image.get("id")) if isinstance(image, dict) else None


def _id_text(value: Any) -> str | None:
    """An id as text: 7, 7.0 and "7" are the same. None if it is no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return str(value) if value != "" and is_text(str(value)) else None


def _by_image(annotations: list[Any], known: set[str | None], file: str) -> tuple[dict[str, list[Any]], list[Rejected]]:
    """Annotations by image id, and those that belong to no image."""
    grouped: dict[str, list[Any]] = defaultdict(list)
    orphans: list[Rejected] = []
    for number, annotation in enumerate(annotations):
        label = f"annotations[{number}]"
        if not isinstance(annotation, dict):
            orphans.append(Rejected(file, label, "the annotation is no object"))
            continue
        image_id = _id_text(annotation.get("image_id"))
        if image_id is None or image_id not in known:
            orphans.append(Rejected(file, label, f"its image_id {shown(annotation.get('image_id'))} is not among the images"))
        else:
            grouped[image_id].append(annotation)
    return grouped, orphans


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number of a size that pixels have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def instance_fault(instance: Any, width: int, height: int) -> str | None:
    """What is wrong with an instance on an image of this size: its category, ``iscrowd``, box and mask. None if nothing is."""
    if not isinstance(instance, dict):
        return "an instance is no object"
    category = instance.get("category_id")
    if category is None:
        return "an instance has no category_id"
    if not is_number(category) or category != int(category):
        return f"the category_id {shown(category)} is no whole number"
    if instance.get("iscrowd") not in (None, 0, 1):
        return f"iscrowd is {shown(instance['iscrowd'])}, not 0 or 1"
    return mask_fault(instance, width, height)


def mask_fault(instance: Any, width: int, height: int) -> str | None:
    """What is wrong with an instance's ``segmentation`` and ``bbox`` on an image of this size, in pixels. None if nothing is.

    Polygons must lie inside the image. RLE (COCO's crowds, plain or compressed) must have the image's size and cover it exactly.
    """
    if not isinstance(instance, dict):
        return "an instance is no object"
    box = instance.get("bbox")
    if box is not None and not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        return f"the box {shown(box)} is not four numbers"
    if box is not None and not _box_inside(box, width, height):
        return f"the box {shown(box)} is outside the {width}x{height} image"
    segmentation = instance.get("segmentation")
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, width, height)
    if not isinstance(segmentation, list) or not segmentation:
        return "an instance has no mask"
    faults = (_polygon_fault(polygon, width, height) for polygon in segmentation)
    return next((fault for fault in faults if fault), None) or (None if any(map(_area, segmentation)) else "a mask has no area")


def _area(polygon: list[float]) -> bool:
    """Whether the corners do not lie on one line."""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    x0, y0 = corners[0]
    a, b = max(corners, key=lambda corner: (corner[0] - x0) ** 2 + (corner[1] - y0) ** 2)
    return any((x - x0) * (b - y0) != (a - x0) * (y - y0) for x, y in corners)


def _box_inside(box: list[float], width: int, height: int) -> bool:
    x, y, w, h = box
    inside = x >= -TOLERANCE and y >= -TOLERANCE and x + w <= width + TOLERANCE and y + h <= height + TOLERANCE
    return inside and w >= 0 and h >= 0


def _polygon_fault(polygon: Any, width: int, height: int) -> str | None:
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(type(v) in (int, float) for v in polygon):
        return "a mask polygon is not a list of three or more x, y pairs"
    if not all(map(is_number, polygon)):
        return f"a mask polygon is outside the {width}x{height} image"
    inside_x = all(-TOLERANCE <= x <= width + TOLERANCE for x in polygon[::2])
    inside_y = all(-TOLERANCE <= y <= height + TOLERANCE for y in polygon[1::2])
    return None if inside_x and inside_y else f"a mask polygon is outside the {width}x{height} image"


def _rle_fault(rle: dict[str, Any], width: int, height: int) -> str | None:
    if rle.get("size") != [height, width]:
        return f"a mask is outside the image: its RLE size is {shown(rle.get('size'))}, the image's is {[height, width]} (height, width)"
    counts = rle.get("counts")
    try:
        runs: Any = _decode_runs(counts) if isinstance(counts, str) else counts
    except (IndexError, ValueError):
        runs = None
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return "a mask's RLE counts cannot be read"
    if sum(runs) != width * height:
        return f"a mask is outside the image: its RLE covers {shown(sum(runs))} pixels, the image has {width * height}"
    return None if sum(runs[1::2]) else "a mask is empty"


def _decode_runs(counts: str) -> list[int]:
    """Run lengths of COCO's compressed RLE: 5 bits a character, little end first, differences to the run before last."""
    runs: list[int] = []
    position = 0
    while position < len(counts):
        value, shift, more = 0, 0, True
        while more:
            code = ord(counts[position]) - 48
            if not 0 <= code < 64 or shift > 30:
                raise ValueError("not a character of compressed RLE")
            value |= (code & 0x1F) << shift
            more, shift, position = bool(code & 0x20), shift + 5, position + 1
            if not more and code & 0x10:
                value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs
