"""Nodes of the evaluation."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.metrics.clip_score import clip_scores
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.frechet import frechet_estimate, mean_estimate
from hypersd_pipeline.metrics.grids import labelled_grid, to_pil
from hypersd_pipeline.metrics.scorer import Scorer, Scores
from hypersd_pipeline.models.lora import Contract, LoRA, merge_lora
from hypersd_pipeline.models.one_step import CONTRACT
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.pipelines.evaluation import results
from hypersd_pipeline.pipelines.evaluation.reference import SPLITS, SplitReference, fingerprint, make_split, read_reference, write_reference
from hypersd_pipeline.pipelines.evaluation.sampling import generate

log = logging.getLogger(__name__)

Metrics = dict[str, float]
FolderWriter = Callable[[Path], None]


def prepare_reference(manifest: Manifest, teacher: TeacherConfig, evaluation: EvaluationConfig) -> FolderWriter:
    """Prompts and features of real test pictures and of the teacher's reconstructions of them; splits stay apart.

    Returns:
        A writer of the folder ``evaluation_reference``.

    Raises:
        UserError: the data set has no split ``test``, or fewer than four rows in a split.
    """
    loaded = load_teacher(teacher, parts=("vae",))
    scorer = Scorer(evaluation, loaded.device)
    splits = {}
    for name, n in zip(SPLITS, (evaluation.samples, evaluation.unseen_samples), strict=True):
        rows = len(manifest.splits.get(name, ()))
        if name == "test_unseen" and not rows:
            continue  # other data sets have no such split
        if rows < 4:
            raise UserError(
                f"manifest: the split '{name}' has {rows} good rows, the evaluation needs 4 at least; add rows to it in "
                f"data.source and run data_prep again."
            )
        splits[name] = make_split(manifest, name, n, loaded, scorer, evaluation)
        log.info("Evaluation reference: %d of %d pictures of '%s'", len(splits[name]), rows, name)
    return functools.partial(write_reference, splits=splits, key={**fingerprint(evaluation, loaded), "data": manifest.key})


@dataclass
class Bench:
    """What all rows of one model share: networks, references, encoded prompts."""

    teacher: Teacher
    scorer: Scorer
    config: EvaluationConfig
    splits: dict[str, SplitReference]
    cond: dict[str, Conditioning] = field(default_factory=dict)
    texts: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, teacher: TeacherConfig, reference: Path, config: EvaluationConfig, data: str | None = None) -> Bench:
        loaded = load_teacher(teacher)
        key = {**fingerprint(config, loaded), **({"data": data} if data else {})}
        bench = cls(loaded, Scorer(config, loaded.device), config, read_reference(reference, key))
        for name, split in bench.splits.items():
            bench.cond[name] = loaded.encode_prompts(split.prompts)
            bench.texts[name] = bench.scorer.text_embeddings(split.prompts)
        return bench

    def row(self, split: str, steps: int, contract: Contract, guidance_scale: float = 1.0) -> tuple[Metrics, list[Image.Image]]:
        """Metrics of one number of steps on one split, and the pictures of the first ``grid_prompts`` prompts."""
        uncond = self.teacher.unconditional(1) if guidance_scale != 1 else None
        batches = generate(
            self.teacher,
            self.cond[split],
            contract.timesteps(steps, self.teacher.schedule.num_train_timesteps),
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            uncond=uncond,
            guidance_scale=guidance_scale,
            eta=contract.eta,
            to_clean=contract.only is not None,
        )
        shown: list[Image.Image] = []
        scores = self.scorer.score_all(watched(batches, shown, self.config.grid_prompts))
        metrics = self.figures(split, f"{steps}_steps", scores)
        log.info(
            "%s, %d steps: %s",
            split,
            steps,
            ", ".join(f"{k.split('/')[0]} {v:.2f}" for k, v in metrics.items() if not k.endswith(("_low", "_high"))),
        )
        return metrics, shown

    def figures(self, split: str, row: str, scores: Scores, against: tuple[str, ...] = ("real", "recon")) -> Metrics:
        """Flat metrics ``<name>/<row>`` with ``_low`` and ``_high``; names begin with ``unseen_`` where the split is ``test_unseen``."""
        prefix = "unseen_" if split == "test_unseen" else ""
        options: dict[str, Any] = {"resamples": self.config.bootstrap, "seed": self.config.seed}
        metrics: Metrics = {}
        for kind in against:
            other = getattr(self.splits[split], kind).features
            metrics |= frechet_estimate(scores.features, other, paired=True, **options).flat(f"{prefix}{self.scorer.distance}_{kind}/{row}")
        clip = clip_scores(scores.embeddings, self.texts[split])
        metrics |= mean_estimate(clip, **options).flat(f"{prefix}clip_score/{row}")
        return metrics | mean_estimate(scores.quality, **options).flat(f"{prefix}image_quality/{row}")


def watched(batches: Iterable[Tensor], shown: list[Image.Image], n: int) -> Iterable[Tensor]:
    """Pass batches on and keep the first ``n`` pictures."""
    for batch in batches:
        shown.extend(to_pil(image) for image in batch[: n - len(shown)])
        yield batch


def _evaluate(
    bench: Bench, steps: Iterable[int], contract: Contract, guidance_scale: float = 1.0
) -> tuple[Metrics, Image.Image, FolderWriter]:
    metrics: Metrics = {}
    samples: dict[int, list[Image.Image]] = {}
    for n in sorted({*steps, contract.steps}):
        figures, samples[n] = bench.row("test", n, contract, guidance_scale)
        metrics |= figures
    metrics["samples"] = len(bench.splits["test"])
    if "test_unseen" in bench.splits:
        metrics |= bench.row("test_unseen", contract.steps, contract, guidance_scale)[0]
        metrics["unseen_samples"] = len(bench.splits["test_unseen"])
    prompts = bench.splits["test"].prompts[: bench.config.grid_prompts]
    grid = labelled_grid([(_steps_label(n), pictures) for n, pictures in samples.items()], prompts)
    return metrics, grid, functools.partial(write_samples, samples=samples)


def _steps_label(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"


def evaluate_teacher(teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig) -> tuple[Metrics, Image.Image, FolderWriter]:
    """The teacher with guidance at each of ``teacher_steps``, and the real pictures and reconstructions themselves as rows.

    Returns:
        Flat metrics (``fd_efficientnet_lite0_recon/25_steps`` ..., rows ``real`` and ``recon`` besides), the picture grid, a writer of
        the pictures.
    """
    bench = Bench.load(teacher, reference, evaluation)
    metrics, grid, samples = _evaluate(bench, evaluation.teacher_steps, Contract(max(evaluation.teacher_steps)), evaluation.guidance_scale)
    for name, split in bench.splits.items():
        metrics |= bench.figures(name, "recon", split.recon, against=("real",)) | bench.figures(name, "real", split.real, against=())
    return metrics, grid, samples


def evaluate_stage(
    lora: LoRA, teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig
) -> tuple[Metrics, Image.Image, FolderWriter]:
    """A LoRA without guidance, on its contract's grid, at each of ``student_steps``, and at its own number on unseen names.

    Returns:
        Flat metrics (``fd_efficientnet_lite0_recon/4_steps`` with ``_low`` and ``_high``, ``clip_score/4_steps``,
        ``image_quality/4_steps``, ``unseen_...`` at the LoRA's own steps), the picture grid, a writer of the pictures.

    Raises:
        UserError: the LoRA carries no sampling contract, it asks for guidance, or it was trained on other data than the reference's.
    """
    contract = Contract.of(lora)
    bench = Bench.load(teacher, reference, evaluation, lora.metadata.get("data_rows"))
    merge_lora(bench.teacher.unet, lora)
    return _evaluate(bench, evaluation.student_steps, contract)


def evaluate_unet(
    unet: Path, teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig
) -> tuple[Metrics, Image.Image, FolderWriter]:
    """The dedicated one-step UNet at its own time input; as `evaluate_stage`."""
    from diffusers import UNet2DConditionModel

    contract = json.loads((unet / CONTRACT).read_text(encoding="utf-8"))
    bench = Bench.load(teacher, reference, evaluation, contract["data_rows"])
    bench.teacher.unet.load_state_dict(UNet2DConditionModel.from_pretrained(unet, use_safetensors=True).state_dict())
    return _evaluate(bench, (1,), Contract(1, only=contract["timesteps"][0]))


def write_samples(folder: Path, samples: Mapping[int, list[Image.Image]]) -> None:
    """Write ``<steps>_steps/<row>.png``; what an earlier run left is removed."""
    for stale in folder.glob("*_steps"):
        shutil.rmtree(stale)
    for steps, pictures in samples.items():
        target = folder / f"{steps}_steps"
        target.mkdir()
        for row, picture in enumerate(pictures):
            picture.save(target / f"{row:02d}.png")


def read_samples(folder: Path, steps: int) -> list[Image.Image]:
    """The pictures of one number of steps, by row; none where they were not made."""
    return [Image.open(path).convert("RGB") for path in sorted((folder / f"{steps}_steps").glob("*.png"))]


MODELS = {"k8": (8,), "k4": (4,), "k2": (2,), "k1": (1,), "feedback": (4,), "unified": (1, 2, 4, 8), "unet": (1,)}
"""The chain's models, in order, and the numbers of steps that are shown of each."""


def summarise(
    reference: Path, teacher_metrics: Metrics, teacher_samples: Path, evaluation: EvaluationConfig, **stages: Any
) -> tuple[str, pd.DataFrame, dict[str, dict[str, float]], Image.Image]:
    """One table of all models and numbers of steps, and the main grid.

    Args:
        stages: ``metrics_<model>`` and, but for feedback, ``samples_<model>`` of the models in `MODELS`.

    Returns:
        The table as markdown, as data frame (a line per figure), the headline figures by row, and the grid: teacher at most and at 4 steps,
        then each model at its own.
    """
    names = [name for name in MODELS if f"metrics_{name}" in stages]
    frame = results.long_table({"teacher": teacher_metrics, **{name: stages[f"metrics_{name}"] for name in names}})
    most = max(evaluation.teacher_steps)
    own = [(name, n) for name in names for n in MODELS[name]]
    columns = [(f"teacher, {_steps_label(n)}", read_samples(teacher_samples, n)) for n in dict.fromkeys((most, 4))]
    columns += [
        (f"{name}, {_steps_label(n)}", read_samples(stages[f"samples_{name}"], n)) for name, n in own if f"samples_{name}" in stages
    ]
    prompts = read_reference(reference)["test"].prompts[: evaluation.grid_prompts]
    headline = results.headline(frame, [("teacher", most), ("teacher", 4), *own])
    return results.markdown(frame, evaluation), frame, headline, labelled_grid([c for c in columns if c[1]], prompts)
