"""Preference pairs as features of the dual encoder's towers: made from a data set, or read from a user's file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hypersd_pipeline.data.images import decode_image, fit
from hypersd_pipeline.data.rows import Manifest, Rejected, Row, sha256_of, share_of
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.dual_encoder import DualEncoder
from hypersd_pipeline.pipelines.reward_models.config import PairsConfig
from hypersd_pipeline.pipelines.teacher.encoders import degrade, image_features, text_features

log = logging.getLogger(__name__)

PARTS = ("trained", "held_out", "test")
"""What each part of the pairs is for: to train either reward, and to test both. No picture and no pair is in two of them."""
CLEAN, CAPTION, SIMILAR, PREFERENCE = "clean_over_degraded", "right_over_wrong_caption", "right_over_similar_caption", "preference"
COLUMNS = ["file", "row", "reason"]


@dataclass(frozen=True)
class PairSet:
    """Preference pairs of one part.

    Attributes:
        image, text: the towers' features, float32 ``[n, 1280]`` and ``[m, 384]``.
        pairs: int64 ``[p, 4]``: the winner's picture and text, the loser's picture and text.
        kind: int64 ``[p]``, index into ``kinds``.
    """

    image: Tensor
    text: Tensor
    pairs: Tensor
    kind: Tensor
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pairs)


def _load_pictures(paths: Sequence[Path], size: int) -> Tensor:
    """uint8 ``[n, 3, size, size]``, centre squares."""
    with ThreadPoolExecutor(4) as pool:
        pixels = list(pool.map(lambda path: fit(decode_image(path.read_bytes()), size)[0], paths))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


# --- from a data set ---------------------------------------------------------------------------------------------------------------------


def pairs_from_manifest(manifest: Manifest, encoder: DualEncoder, config: PairsConfig) -> dict[str, PairSet]:
    """Clean against degraded pictures with the right caption, and the right against a wrong caption with the same picture.

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
        log.info("reward pairs, %s: %d of %d pictures", part, len(made[part]), len(rows[part]))
    return made


def _pairs_of_rows(manifest: Manifest, rows: Sequence[Row], encoder: DualEncoder, config: PairsConfig, rng: np.random.Generator) -> PairSet:
    n = len(rows)
    captions = [row.captions[0] for row in rows]
    pictures = _load_pictures([manifest.path(row) for row in rows], encoder.config.image_size)
    rounds = [degrade(pictures, rng)[0] for _ in range(config.degraded)]
    image = torch.cat([image_features(encoder, batch) for batch in (pictures, *rounds)])
    text = text_features(encoder, captions)
    own = np.arange(n)
    found: list[tuple[int, np.ndarray]] = []  # kind, and columns winner's picture and text, loser's picture and text
    found += [(0, np.stack([own, own, own + n * (i + 1), own], 1)) for i in range(config.degraded)]
    others = _other_captions(captions, encoder, text, config, rng)
    found += [(kind, np.stack([own, own, own, other], 1)) for kind, other in others]
    kind = np.concatenate([np.full(n, kind) for kind, _ in found])
    pairs = np.concatenate([block for _, block in found])
    return PairSet(image.cpu(), text.cpu(), torch.from_numpy(pairs), torch.from_numpy(kind), (CLEAN, CAPTION, SIMILAR))


def _other_captions(
    captions: Sequence[str], encoder: DualEncoder, text: Tensor, config: PairsConfig, rng: np.random.Generator
) -> list[tuple[int, np.ndarray]]:
    """Kind 1: any caption that differs; kind 2: one of the most similar ones that differ. Rows of other pictures, ``[n]`` each."""
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
    """A good row of a user's file; pictures are absolute paths."""

    prompt: str
    winner: Path
    loser: Path


def read_preferences(file: Path) -> tuple[list[Preference], pd.DataFrame]:
    """Good rows, and a table (file, row, reason) with a line for each bad one.

    Raises:
        UserError: the file is missing, or has no good row.
    """
    if not file.is_file():
        raise UserError(f"reward_pairs.file: {file} does not exist; give a .jsonl file with prompt, winner and loser a line.")
    good: list[Preference] = []
    bad: list[Rejected] = []
    readable: dict[Path, str | None] = {}
    for number, record in _records(file):
        row = _preference(record, file.parent, readable)
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


def _records(file: Path) -> Iterator[tuple[int, Any]]:
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError:
                    yield number, None


def _preference(record: Any, folder: Path, readable: dict[Path, str | None]) -> Preference | str:
    """The row, or what is wrong with it."""
    if not isinstance(record, dict):
        return "the line is no JSON object"
    for key in ("prompt", "winner", "loser"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            return f"{key} is missing or empty"
    winner, loser = ((folder / record[key]).absolute() for key in ("winner", "loser"))
    if winner == loser:
        return "winner and loser are the same picture"
    for key, path in (("winner", winner), ("loser", loser)):
        if path not in readable:
            readable[path] = _picture_fault(path)
        if fault := readable[path]:
            return f"{key}: {fault}"
    return Preference(record["prompt"].strip(), winner, loser)


def _picture_fault(path: Path) -> str | None:
    try:
        decode_image(path.read_bytes())
    except OSError as error:  # PIL's own "cannot identify" is one, too
        return "the file is missing" if isinstance(error, FileNotFoundError) else "the picture cannot be read"
    except Exception as error:  # image decoders raise whatever they like on broken content
        return f"the picture cannot be read ({type(error).__name__})"
    return None


def divide(preferences: Sequence[Preference]) -> dict[str, list[Preference]]:
    """A tenth of the prompts to test, the others to either reward in halves, by a hash of the prompt: no prompt is in two parts.

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
    """Features of a user's pairs; each picture and prompt of a part is encoded once.

    Raises:
        UserError: fewer than ten prompts.
    """
    made = {}
    for part, rows in divide(preferences).items():
        paths = sorted({path for row in rows for path in (row.winner, row.loser)})
        prompts = sorted({row.prompt for row in rows})
        at = {path: i for i, path in enumerate(paths)}
        pairs = [[at[row.winner], prompts.index(row.prompt), at[row.loser], prompts.index(row.prompt)] for row in rows]
        image = image_features(encoder, _load_pictures(paths, encoder.config.image_size))
        text = text_features(encoder, prompts)
        made[part] = PairSet(image.cpu(), text.cpu(), torch.tensor(pairs), torch.zeros(len(pairs), dtype=torch.int64), (PREFERENCE,))
    return made


# --- the cache ---------------------------------------------------------------------------------------------------------------------------


def write_pairs(folder: Path, parts: Mapping[str, PairSet], encoder_key: str) -> None:
    """``<part>.safetensors`` each, with the hash of the encoder and of its own tensors' source in the metadata."""
    for name, part in parts.items():
        tensors = {"image": part.image, "text": part.text, "pairs": part.pairs, "kind": part.kind}
        metadata = {"kinds": json.dumps(part.kinds), "encoder": encoder_key, "key": sha256_of([_digest(v) for v in tensors.values()])}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors", metadata=metadata)


def _digest(tensor: Tensor) -> list[float]:
    return [float(tensor.double().sum()), float(tensor.double().square().sum()), *tensor.shape]


def read_pairs(folder: Path, part: str, encoder_key: str) -> tuple[PairSet, str]:
    """One part, and a key of its content.

    Raises:
        UserError: the file is missing, or was made with another encoder.
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
