"""Preference pairs as features of the dual encoder's towers: made from a data set, or read from a user's file, and cached."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pydantic import Field
from safetensors import safe_open
from torch import Tensor

from hypersd_pipeline.config import Count, Seed, Strict
from hypersd_pipeline.data.degradations import degrade
from hypersd_pipeline.data.images import MAX_BYTES, decode_image, fit, load_image
from hypersd_pipeline.data.reading import BadFile, is_text, leads_out, lines_of, parse_line, read_inside
from hypersd_pipeline.data.rows import Manifest, Rejected, Row, share_of
from hypersd_pipeline.data.stored import load_row
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import sha256_of, tensors_sha256, write_tensors
from hypersd_pipeline.models.dual_encoder import DualEncoder, features_of_captions, features_of_images, load_dual_encoder

log = logging.getLogger(__name__)

PARTS = ("trained", "held_out", "test")
"""What each part of the pairs is for: to train either reward, and to test both. No image and no pair is in two of them."""
CLEAN, CAPTION, SIMILAR, PREFERENCE = "clean_over_degraded", "right_over_wrong_caption", "right_over_similar_caption", "preference"
COLUMNS = ["file", "row", "reason"]


class PreferencesConfig(Strict):
    """Where preference pairs come from.

    Attributes:
        file: a ``.jsonl`` with ``prompt``, ``winner`` and ``loser`` a line, whose images are relative to the file.
            With None pairs are made from the data set, and everything below counts.
        images: images of the split ``train``. One half, by a hash of the id, trains the text-image reward, the other the held-out one.
        test_images: of the split ``test``.
        degraded: worse versions of each image.
        wrong_captions: other images' captions for each image, any that differ.
        similar_captions: other images' captions for each image, each one of the ``neighbours`` most similar ones.
        neighbours: among how many captions a similar one is drawn.
        seed: of degradations and captions.
    """

    file: Path | None = None
    images: int = Field(default=3000, ge=4)
    test_images: int = Field(default=500, ge=2)
    degraded: Count = 2
    wrong_captions: Count = 4
    similar_captions: int = Field(default=8, ge=0)
    neighbours: Count = 16
    seed: Seed = 0


@dataclass(frozen=True)
class PairSet:
    """Preference pairs of one part.

    Attributes:
        image: the vision tower's features, float32 ``[n, 1280]``.
        text: the text tower's features, float32 ``[m, 384]``.
        pairs: int64 ``[p, 4]``, rows of ``image`` and ``text``: the winner's image and text, the loser's image and text.
        kind: int64 ``[p]``, index into ``kinds``.
        kinds: names of the kinds of pairs.
    """

    image: Tensor
    text: Tensor
    pairs: Tensor
    kind: Tensor
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pairs)


def make_preferences(manifest: Manifest, config: PreferencesConfig) -> tuple[Callable[[Path], None], pd.DataFrame]:
    """Preference pairs as features of the packaged dual encoder.

    Returns:
        A writer of the pairs' cache (`write_preferences_cache`), and the table of bad rows of a user's file (file, row, reason).

    Raises:
        UserError: too few rows or prompts, or a user's file that is missing or has no good row.
    """
    encoder = load_dual_encoder().to("cuda" if torch.cuda.is_available() else "cpu")
    rejected = pd.DataFrame(columns=COLUMNS)
    if config.file is None:
        parts = pairs_from_manifest(manifest, encoder, config)
    else:
        preferences, rejected = read_preferences(Path(os.path.expanduser(config.file)))
        parts = pairs_from_preferences(preferences, encoder)
    return partial(write_preferences_cache, parts=parts, encoder_key=tensors_sha256(encoder.trained_tensors())), rejected


def _fitted(loads: Sequence[Callable[[], Image.Image]], size: int) -> Tensor:
    """What the functions load, as uint8 ``[n, 3, size, size]``, centre squares."""
    with ThreadPoolExecutor(4) as pool:
        pixels = list(pool.map(lambda load: fit(load(), size)[0], loads))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


# --- from a data set ---------------------------------------------------------------------------------------------------------------------


def pairs_from_manifest(manifest: Manifest, encoder: DualEncoder, config: PreferencesConfig) -> dict[str, PairSet]:
    """Clean against degraded images with the right caption, and the right against a wrong caption with the same image.

    Returns:
        The pairs of each part (`PARTS`).

    Raises:
        UserError: a split is missing, or too small to be divided.
    """
    train, test = (manifest.splits.get(name, ()) for name in ("train", "test"))
    train = train[: config.images]
    rows = {
        "trained": [row for row in train if share_of(row.image_id) < 0.5],
        "held_out": [row for row in train if share_of(row.image_id) >= 0.5],
        "test": list(test[: config.test_images]),
    }
    made = {}
    for number, part in enumerate(PARTS):
        if len({row.captions[0] for row in rows[part]}) < 2:
            raise UserError(
                f"manifest: the splits train and test have too few captions for the reward models' part {part!r}; add rows to them in "
                "data.source and run data_prep again, or give pairs of your own in reward_pairs.file."
            )
        rng = np.random.default_rng([config.seed, number])
        made[part] = _pairs_of_rows(manifest, rows[part], encoder, config, rng)
        log.info("reward pairs, %s: %d of %d images", part, len(made[part]), len(rows[part]))
    return made


def _pairs_of_rows(
    manifest: Manifest, rows: Sequence[Row], encoder: DualEncoder, config: PreferencesConfig, rng: np.random.Generator
) -> PairSet:
    n = len(rows)
    captions = [row.captions[0] for row in rows]
    images = _fitted([partial(load_row, manifest, row) for row in rows], encoder.config.image_size)
    rounds = [degrade(images, rng)[0] for _ in range(config.degraded)]
    image = torch.cat([features_of_images(encoder, batch) for batch in (images, *rounds)])
    text = features_of_captions(encoder, captions)
    own = np.arange(n)
    found: list[tuple[int, np.ndarray]] = []  # kind, and columns winner's image and text, loser's image and text
    found += [(0, np.stack([own, own, own + n * (i + 1), own], 1)) for i in range(config.degraded)]
    others = _other_captions(captions, encoder, text, config, rng)
    found += [(kind, np.stack([own, own, own, other], 1)) for kind, other in others]
    kind = np.concatenate([np.full(n, kind) for kind, _ in found])
    pairs = np.concatenate([block for _, block in found])
    return PairSet(image.cpu(), text.cpu(), torch.from_numpy(pairs), torch.from_numpy(kind), (CLEAN, CAPTION, SIMILAR))


def _other_captions(
    captions: Sequence[str], encoder: DualEncoder, text: Tensor, config: PreferencesConfig, rng: np.random.Generator
) -> list[tuple[int, np.ndarray]]:
    """Kind and rows of other captions, int64 ``[n]`` each.

    Kind 1 is any caption that differs. Kind 2 is one of the most similar ones that differ.
    """
    names = np.array(captions)
    with torch.no_grad():
        unit = encoder.project_texts(text).cpu()
    found: list[tuple[int, np.ndarray]] = []
    for kind, count in ((1, config.wrong_captions), (2, config.similar_captions)):
        rows = [_differing(unit, names, i, config.neighbours if kind == 2 else None) for i in range(len(names))]
        found += [(kind, np.array([rng.choice(candidates) for candidates in rows])) for _ in range(count)]
    return found


def _differing(unit: Tensor, names: np.ndarray, i: int, nearest: int | None) -> np.ndarray:
    other = np.flatnonzero(names != names[i])
    if nearest is None or nearest >= len(other):
        return other
    return other[(unit[other] @ unit[i]).topk(nearest).indices.numpy()]


# --- from a user's file ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preference:
    """A good row of a user's file. Images are absolute paths."""

    prompt: str
    winner: Path
    loser: Path


def read_preferences(file: Path) -> tuple[list[Preference], pd.DataFrame]:
    """A user's ``.jsonl`` file of preferences.

    Returns:
        The good rows, and a table (file, row, reason) with a line for each bad one.

    Raises:
        UserError: the file is missing, or has no good row.
    """
    try:
        lines = lines_of(file.parent, file.name)
    except BadFile as error:
        what = f"{error}" if file.exists() else "does not exist"
        raise UserError(f"reward_pairs.file: {file} {what}; give a .jsonl file with prompt, winner and loser a line.") from None
    good: list[Preference] = []
    bad: list[Rejected] = []
    readable: dict[Path, str | None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _preference(line, file.parent, readable)
        if isinstance(row, Preference):
            good.append(row)
        else:
            bad.append(Rejected(file.name, f"line {number}", row))
    if not good:
        first = f" (first: {bad[0].row}: {bad[0].reason})" if bad else ""
        raise UserError(f"{file}: has no good row, {len(bad)} bad ones{first}; mend the file, or remove reward_pairs.file.")
    if bad:
        log.warning("%s: %d bad rows of %d were left out; see rejected_pairs", file, len(bad), len(bad) + len(good))
    return good, pd.DataFrame([(r.file, r.row, r.reason) for r in bad], columns=COLUMNS)


def _preference(line: bytes, folder: Path, readable: dict[Path, str | None]) -> Preference | str:
    """The row, or what is wrong with it."""
    try:
        record = parse_line(line)
    except BadFile as error:
        return str(error)
    for key in ("prompt", "winner", "loser"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            return f"{key} is missing or empty"
        if not is_text(record[key]):
            return f"{key} has a lone surrogate, which is no text"
    for key in ("winner", "loser"):
        if leads_out(record[key]):
            return f"{key}: the file name leads out of the folder of the .jsonl"
    winner, loser = (Path(os.path.normpath((folder / record[key]).absolute())) for key in ("winner", "loser"))
    if winner == loser:
        return "winner and loser are the same image"
    for key, path in (("winner", winner), ("loser", loser)):
        if path not in readable:
            readable[path] = _image_fault(folder, path)
        if fault := readable[path]:
            return f"{key}: {fault}"
    return Preference(record["prompt"].strip(), winner, loser)


def _image_fault(folder: Path, path: Path) -> str | None:
    try:
        decode_image(read_inside(folder, path, MAX_BYTES))
    except BadFile as fault:
        return str(fault)
    return None


def divide(preferences: Sequence[Preference]) -> dict[str, list[Preference]]:
    """A tenth of the prompts to test, the others to either reward in halves, by a hash of the prompt.

    Returns:
        The rows of each part (`PARTS`). No prompt is in two parts.

    Raises:
        UserError: fewer than ten prompts.
    """
    prompts = sorted({p.prompt for p in preferences}, key=share_of)
    if len(prompts) < 10:
        raise UserError(f"reward_pairs.file: has {len(prompts)} different prompts in its good rows, 10 at least are needed; add pairs.")
    test = max(1, len(prompts) // 10)
    half = (len(prompts) - test + 1) // 2
    part = {prompt: "test" if i < test else "trained" if i < test + half else "held_out" for i, prompt in enumerate(prompts)}
    return {name: [p for p in preferences if part[p.prompt] == name] for name in PARTS}


def pairs_from_preferences(preferences: Sequence[Preference], encoder: DualEncoder) -> dict[str, PairSet]:
    """Features of a user's pairs. Each image and prompt of a part is encoded once.

    Returns:
        The pairs of each part (`PARTS`).

    Raises:
        UserError: fewer than ten prompts.
    """
    made = {}
    for part, rows in divide(preferences).items():
        paths = sorted({path for row in rows for path in (row.winner, row.loser)})
        prompts = sorted({row.prompt for row in rows})
        at = {path: i for i, path in enumerate(paths)}
        pairs = [[at[row.winner], prompts.index(row.prompt), at[row.loser], prompts.index(row.prompt)] for row in rows]
        image = features_of_images(encoder, _fitted([partial(load_image, path) for path in paths], encoder.config.image_size))
        text = features_of_captions(encoder, prompts)
        made[part] = PairSet(image.cpu(), text.cpu(), torch.tensor(pairs), torch.zeros(len(pairs), dtype=torch.int64), (PREFERENCE,))
    return made


# --- the cache ---------------------------------------------------------------------------------------------------------------------------


def write_preferences_cache(folder: Path, parts: Mapping[str, PairSet], encoder_key: str) -> None:
    """Write ``<part>.safetensors`` for each part, with the encoder's hash and a key of the content in the metadata."""
    for name, part in parts.items():
        tensors = {"image": part.image, "text": part.text, "pairs": part.pairs, "kind": part.kind}
        metadata = {"kinds": json.dumps(part.kinds), "encoder": encoder_key, "key": sha256_of([_digest(v) for v in tensors.values()])}
        write_tensors(folder / f"{name}.safetensors", tensors, metadata)


def _digest(tensor: Tensor) -> list[float]:
    return [float(tensor.double().sum()), float(tensor.double().square().sum()), *tensor.shape]


def read_preferences_cache(folder: Path, part: str, encoder_key: str) -> tuple[PairSet, str]:
    """One part of the cache.

    Args:
        folder: where `write_preferences_cache` wrote.
        part: one of `PARTS`.
        encoder_key: hash of the dual encoder's trained tensors.

    Returns:
        The pairs, and a key of their content.

    Raises:
        UserError: the file is missing or damaged, or was made with another encoder.
    """
    path = folder / f"{part}.safetensors"
    cure = "run 'kedro run --pipelines reward_models' again"
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
    except Exception as error:  # safetensors raises its own, undocumented type
        raise UserError(f"{path}: the reward pairs are missing or damaged ({type(error).__name__}); {cure}.") from error
    if metadata.get("encoder") != encoder_key:
        raise UserError(f"{path}: was made with another dual encoder; {cure}.")
    return PairSet(**tensors, kinds=tuple(json.loads(metadata["kinds"]))), metadata["key"]
