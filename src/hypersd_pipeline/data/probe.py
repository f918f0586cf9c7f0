"""What a teacher's encoders give for one fixed image and one fixed prompt, as a short hash.

Weights that were read only in part give another hash, though the files are the same. Other processors give the same one: the numbers are
rounded, and a cache that was made with nearly the same numbers keeps its hash.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import sha256_of, write_text
from hypersd_pipeline.models.teacher import Teacher

FILE = "encoders.json"
PROMPTS = ("a red apple on a blue table", "two cats under a green tree at night")
NUMBERS = 8
STEPS = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.25}
"""What the numbers, which are about 1, are rounded to: above the noise of each dtype."""


def probe(teacher: Teacher, folder: Path | None = None) -> dict[str, str]:
    """A hash for each of the encoders ``vae`` and ``text``.

    Args:
        folder: of a cache, in whose ``encoders.json`` the numbers are kept. None to keep nothing.

    Raises:
        UserError: an encoder gives numbers that are not finite, or the same embedding for two prompts.
    """
    known = _read(folder) if folder else {}
    dtypes = teacher.config.vae_dtype, teacher.config.dtype
    entries = {
        "vae": _entry("vae", known, [teacher.content_hash("vae"), dtypes[0]], _of_image(teacher), STEPS[dtypes[0]]),
        "text": _entry("text", known, [teacher.content_hash("text"), dtypes[1]], _of_prompts(teacher), STEPS[dtypes[1]]),
    }
    if folder and entries != known:
        write_text(folder / FILE, json.dumps(entries, indent=1) + "\n")
    return {part: str(entry["hash"]) for part, entry in entries.items()}


def _entry(part: str, known: dict[str, Any], origin: list[str], numbers: list[float], step: float) -> dict[str, Any]:
    """The numbers, what they are of, and their hash, or the hash that the folder has already."""
    found = _kept(known.get(part), origin, numbers, step) or sha256_of([part, [round(number / step) for number in numbers]])[:16]
    return {"of": origin, "numbers": numbers, "hash": found}


def _kept(known: Any, origin: list[str], numbers: list[float], step: float) -> str | None:
    """The hash of the folder's numbers where these are the same but for rounding."""
    try:
        same = known["of"] == origin and max(abs(a - b) for a, b in zip(known["numbers"], numbers, strict=True)) <= 2 * step
        return str(known["hash"]) if same else None
    except (KeyError, TypeError, ValueError):
        return None


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@torch.inference_mode()
def _of_image(teacher: Teacher) -> list[float]:
    reduction = teacher.resolution // teacher.latent_shape[-1]
    side = min(teacher.resolution, 8 * reduction)
    y, x = np.mgrid[:side, :side] / side
    waves = np.stack([np.sin(6 * x + 2 * y), np.cos(4 * y - x), np.sin(9 * x * y)])
    image = 0.7 * waves + 0.3 * np.random.default_rng(0).uniform(-1, 1, waves.shape)
    mean, std = teacher.encode_images(torch.from_numpy(image)[None].float())
    return _summary([mean, std], "the teacher's VAE", "set teacher.vae_dtype to float32 (SDXL's VAE needs it), or fetch the teacher again")


@torch.inference_mode()
def _of_prompts(teacher: Teacher) -> list[float]:
    cond = teacher.encode_prompts(PROMPTS)
    if torch.equal(cond.prompt_embeds[0], cond.prompt_embeds[1]):
        raise UserError(
            f"{teacher.folder}: the tokenizer or the text encoder gives the same embedding for every prompt; fetch the teacher again, "
            "with all files of the tokenizer."
        )
    pooled = [] if cond.pooled is None else [cond.pooled[0]]
    return _summary(
        [cond.prompt_embeds[0], *pooled], "the teacher's text encoder", "set teacher.dtype to float32, or fetch the teacher again"
    )


def _summary(tensors: list[Tensor], what: str, cure: str) -> list[float]:
    """Fixed random projections of each tensor, divided by its length: numbers of about 1 that every element has a part in."""
    numbers: list[float] = []
    for tensor in tensors:
        values = tensor.double().cpu().numpy().ravel()
        if not np.isfinite(values).all():
            raise UserError(f"{what} gives numbers that are not finite; {cure}.")
        directions = np.random.default_rng(len(numbers)).standard_normal((NUMBERS, len(values)))
        numbers += (directions @ values / max(float(np.linalg.norm(values)), 1e-12)).tolist()
    return [round(number, 6) for number in numbers]
