"""What every row of the evaluation is compared with: prompts, and the features of real images and of their VAE reconstructions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hypersd_pipeline.data.images import fit
from hypersd_pipeline.data.rows import Manifest, Row
from hypersd_pipeline.data.stored import load_row
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import write_tensors, write_text
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.scorer import Scorer, Scores
from hypersd_pipeline.models.teacher import Teacher

SPLITS = ("test", "test_unseen")
_REWARD = "reward_"


@dataclass(frozen=True)
class SplitReference:
    """One split: ``n`` prompts, and the scores of the real images and of the teacher's reconstructions of the same images."""

    prompts: list[str]
    real: Scores
    recon: Scores

    def __len__(self) -> int:
        return len(self.prompts)


def choose_rows(rows: Sequence[Row], n: int, seed: int) -> list[Row]:
    """``n`` rows, or all where there are fewer, drawn by the seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]
    return [rows[i] for i in order.tolist()]


def images_of(manifest: Manifest, rows: Sequence[Row], resolution: int, batch_size: int) -> Iterator[Tensor]:
    """Batches of the rows' images as the latent cache prepares them, ``[b, 3, r, r]`` in [0, 1]."""
    for start in range(0, len(rows), batch_size):
        pixels = [fit(load_row(manifest, row), resolution)[0] for row in rows[start : start + batch_size]]
        yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


def make_split(manifest: Manifest, split: str, n: int, teacher: Teacher, scorer: Scorer, config: EvaluationConfig) -> SplitReference:
    """Score ``n`` real images of a split and their reconstructions (posterior mean, decoded)."""
    rows = choose_rows(manifest.splits[split], n, config.seed)
    size = teacher.resolution
    prompts = [row.captions[0] for row in rows]
    real, recon = [], []
    for start, batch in zip(count(step=config.batch_size), images_of(manifest, rows, size, config.batch_size), strict=False):
        some = prompts[start : start + len(batch)]
        real.append(scorer.score(batch, some))
        with torch.inference_mode():
            recon.append(scorer.score(teacher.decode(teacher.encode_images(batch * 2 - 1)[0]), some))
    return SplitReference(prompts, Scores.cat(real), Scores.cat(recon))


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
        **({"rewards": json.dumps([reward.model_dump(mode="json") for reward in config.rewards])} if config.rewards else {}),
    }


def write_reference(folder: Path, splits: Mapping[str, SplitReference], key: Mapping[str, str]) -> None:
    """Write ``<split>.safetensors`` and ``reference.json`` (prompts, and what the features were made with)."""
    for name, split in splits.items():
        both = {"real": split.real, "recon": split.recon}
        tensors = {f"{kind}.{field}": getattr(scores, field) for kind, scores in both.items() for field in Scores.FIELDS}
        rewards = {f"{kind}.{_REWARD}{reward}": values for kind, scores in both.items() for reward, values in scores.rewards.items()}
        write_tensors(folder / f"{name}.safetensors", {**tensors, **rewards})
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
        real, recon = (_scores(tensors, f"{kind}.") for kind in ("real", "recon"))
        splits[name] = SplitReference(prompts, real, recon)
    return splits


def _scores(tensors: Mapping[str, Tensor], kind: str) -> Scores:
    rewards = {name.removeprefix(f"{kind}{_REWARD}"): values for name, values in tensors.items() if name.startswith(f"{kind}{_REWARD}")}
    return Scores(**{field: tensors[f"{kind}{field}"] for field in Scores.FIELDS}, rewards=rewards)
