"""The scores of a model prompt by prompt, in a file: what a comparison of two models on the same prompts needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.reference import SplitReference
from hypersd_pipeline.files import sha256_of, tensors_sha256, write_tensors
from hypersd_pipeline.metrics.config import EvaluationConfig

FILE = "scores.safetensors"
_STEPS = "_steps"


@dataclass(frozen=True)
class PromptScores:
    """What each prompt of the split ``test`` adds to each metric of one model. The mean over the prompts is the metric.

    A Frechet distance has such parts too: its value plus each prompt's influence on it (`metrics.frechet.influence`).

    Attributes:
        prompts: ``n`` of them.
        identity: what has to be equal for a comparison: ``seed`` of the noise, ``reference`` (hash of what distances are measured to)
            and ``judges`` (hash of their configuration).
        values: number of steps -> metric -> ``[n]`` float64.
    """

    prompts: list[str]
    identity: Mapping[str, str]
    values: Mapping[int, Mapping[str, Tensor]]


def identity_of(split: SplitReference, config: EvaluationConfig) -> dict[str, str]:
    """See `PromptScores.identity`."""
    judges = config.model_dump(mode="json", include={"features": {"kind", "resolution"}, "clip": True, "rewards": True})
    reference = {"real": split.real.features, "recon": split.recon.features}
    return {"seed": str(config.seed), "reference": tensors_sha256(reference), "judges": sha256_of(judges)}


def write_scores(folder: Path, scores: PromptScores) -> None:
    """Write ``scores.safetensors``: a tensor ``<steps>_steps/<metric>`` each, prompts and identity as metadata."""
    tensors = {f"{steps}{_STEPS}/{metric}": rows.clone() for steps, metrics in scores.values.items() for metric, rows in metrics.items()}
    content = {"prompts": scores.prompts, "identity": dict(scores.identity)}
    write_tensors(folder / FILE, tensors, {"scores": json.dumps(content, ensure_ascii=False)})


def read_scores(folder: Path) -> PromptScores:
    """What `write_scores` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    path, cure = folder / FILE, "evaluate the model again"
    try:
        values: dict[int, dict[str, Tensor]] = {}
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})["scores"])
            prompts, identity = [str(prompt) for prompt in content["prompts"]], {str(k): str(v) for k, v in content["identity"].items()}
            for name in file.keys():
                steps, _, metric = name.partition("/")
                rows = file.get_tensor(name).double()
                if rows.shape != (len(prompts),) or not rows.isfinite().all():
                    raise ValueError(f"{name} is not one finite number for each of {len(prompts)} prompts")
                values.setdefault(int(steps.removesuffix(_STEPS)), {})[metric] = rows
    except FileNotFoundError:
        raise UserError(f"{path} is missing, as before version 0.2; {cure}.") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); {cure}.") from None
    if not values or not prompts:
        raise UserError(f"{path} holds no scores; {cure}.")
    return PromptScores(prompts, identity, dict(sorted(values.items())))
