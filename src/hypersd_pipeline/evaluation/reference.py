"""What every row of the evaluation is compared with: prompts, and the scores of real images, of reconstructions and of the teacher."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hypersd_pipeline.data.images import fit
from hypersd_pipeline.data.rows import Manifest, Row
from hypersd_pipeline.data.stored import load_row
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.sampling import batches
from hypersd_pipeline.evaluation.scoring import Way, score_samples
from hypersd_pipeline.files import fingerprint, write_tensors, write_text
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.scorer import Scorer, Scores
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.teacher import Teacher
from hypersd_pipeline.training import distributed

SPLITS = ("test", "test_unseen")
_REWARD = "reward_"
_SHOWN, _TEXTS = "shown", "texts"


@dataclass(frozen=True)
class SplitReference:
    """One split: ``n`` prompts, and the scores of their images.

    Attributes:
        real: of the real images. recon: of the VAE's reconstructions of them.
        teacher: of the teacher's samples, with guidance, at the most of its numbers of steps, from the noise that all rows share.
        shown: the first of the teacher's samples, for grids.
        texts: unit vectors ``[n, e]`` of the prompts, for the CLIP score.
    """

    KINDS: ClassVar = ("real", "recon", "teacher")
    prompts: list[str]
    real: Scores
    recon: Scores
    teacher: Scores
    shown: list[Image.Image]
    texts: Tensor

    def __len__(self) -> int:
        return len(self.prompts)


def choose_rows(rows: Sequence[Row], n: int, seed: int) -> list[Row]:
    """``n`` rows, or all where there are fewer, drawn by the seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]
    return [rows[i] for i in order.tolist()]


def images_of(manifest: Manifest, rows: Sequence[Row], resolution: int) -> Tensor:
    """The rows' images as the latent cache prepares them, ``[b, 3, r, r]`` in [0, 1]."""
    pixels = [fit(load_row(manifest, row), resolution)[0] for row in rows]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


def make_split(manifest: Manifest, split: str, n: int, teacher: Teacher, scorer: Scorer, config: EvaluationConfig) -> SplitReference:
    """Score ``n`` real images of a split, their reconstructions (posterior mean, decoded), and the teacher's samples of their prompts.

    Each process does so for its batches, and has the scores of all afterwards.
    """
    rows = choose_rows(manifest.splits[split], n, config.seed)
    prompts = [row.captions[0] for row in rows]
    parts = []
    for indices in distributed.mine(batches(len(rows), config.batch_size)):
        part = slice(indices.start, indices.stop)
        images = images_of(manifest, rows[part], teacher.resolution)
        with torch.inference_mode():
            decoded = teacher.decode(teacher.encode_images(images * 2 - 1)[0])
        parts.append((scorer.score(images, prompts[part]), scorer.score(decoded, prompts[part])))
    real, recon = (Scores.cat(scores) for scores in zip(*distributed.gathered(parts), strict=True))
    samples, shown = score_samples(teacher, scorer, config, prompts, teacher.encode_prompts(prompts), teachers_way(config))
    return SplitReference(prompts, real, recon, samples, shown, scorer.text_embeddings(prompts))


def teachers_way(config: EvaluationConfig) -> Way:
    """How the teacher is sampled at its best: with guidance, at the most of its numbers of steps."""
    steps = max(config.teacher_steps)
    return Way(Contract(steps), steps, config.guidance_scale)


def reference_key(config: EvaluationConfig, teacher: Teacher) -> dict[str, str]:
    """What a stored reference depends on besides the images (``data``, the manifest's key). The noise depends on the seed."""
    features = config.features.model_dump_json(include={"kind", "resolution"})
    clip = config.clip.model_dump_json()
    sizes = json.dumps([config.samples, config.unseen_samples])
    return {
        "features": features,
        "clip": clip,
        "samples": sizes,
        "seed": str(config.seed),
        "vae": teacher.content_hash("vae"),
        "resolution": str(teacher.resolution),
        "teacher": fingerprint(teacher.content_hash("backbone"), teacher.scheduler_config(), teacher.config.dtype),
        "teacher's sampling": json.dumps(
            [max(config.teacher_steps), config.guidance_scale, config.mixed_precision, config.grid_prompts, "crops", "texts"]
        ),
        **({"split": config.split} if config.split != "test" else {}),
        **({"rewards": json.dumps([reward.model_dump(mode="json") for reward in config.rewards])} if config.rewards else {}),
    }


def write_reference(folder: Path, splits: Mapping[str, SplitReference], key: Mapping[str, str]) -> None:
    """Write ``<split>.safetensors`` and ``reference.json`` (prompts, and what the features were made with)."""
    for name, split in splits.items():
        each = {kind: getattr(split, kind) for kind in SplitReference.KINDS}
        tensors = {f"{kind}.{field}": getattr(scores, field) for kind, scores in each.items() for field in Scores.FIELDS}
        rewards = {f"{kind}.{_REWARD}{reward}": values for kind, scores in each.items() for reward, values in scores.rewards.items()}
        shown = torch.from_numpy(np.stack([np.asarray(image) for image in split.shown]))
        write_tensors(folder / f"{name}.safetensors", {**tensors, **rewards, _SHOWN: shown, _TEXTS: split.texts})
    content = {"made_with": dict(key), "prompts": {name: split.prompts for name, split in splits.items()}}
    write_text(folder / "reference.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_reference(folder: Path, key: Mapping[str, str] | None = None) -> dict[str, SplitReference]:
    """Read what :func:`write_reference` wrote, and refuse it where ``key`` says that it was made with something else.

    Raises:
        UserError: the reference is missing, or does not fit the configuration or the teacher.
    """
    path = folder / "reference.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; run the node prepare_reference first (kedro run --nodes prepare_reference).")
    content = json.loads(path.read_text(encoding="utf-8"))
    if changed := sorted(k for k in key or {} if content["made_with"].get(k) != (key or {})[k]):
        raise UserError(
            f"{path}: was made with other {', '.join(changed)}; run prepare_reference again (kedro run --nodes prepare_reference)."
        )
    splits = {}
    for name, prompts in content["prompts"].items():
        tensors = load_file(folder / f"{name}.safetensors")
        scores = {kind: _scores(tensors, f"{kind}.") for kind in SplitReference.KINDS}
        shown = [Image.fromarray(image) for image in tensors[_SHOWN].numpy()]
        splits[name] = SplitReference(prompts, **scores, shown=shown, texts=tensors[_TEXTS])
    return splits


def _scores(tensors: Mapping[str, Tensor], kind: str) -> Scores:
    rewards = {name.removeprefix(f"{kind}{_REWARD}"): values for name, values in tensors.items() if name.startswith(f"{kind}{_REWARD}")}
    return Scores(**{field: tensors[f"{kind}{field}"] for field in Scores.FIELDS}, rewards=rewards)
