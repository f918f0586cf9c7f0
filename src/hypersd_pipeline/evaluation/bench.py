"""What all rows of an evaluation share, and the evaluations of a teacher, a LoRA and a one-step UNet."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.reference import SPLITS, SplitReference, make_split, read_reference, reference_key, write_reference
from hypersd_pipeline.evaluation.samples import steps_label, write_samples
from hypersd_pipeline.evaluation.sampling import generate
from hypersd_pipeline.evaluation.scores import PromptScores, identity_of
from hypersd_pipeline.metrics.clip_score import clip_scores
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.frechet import Estimate, frechet_estimate, mean_estimate
from hypersd_pipeline.metrics.grids import labelled_grid, to_pil
from hypersd_pipeline.metrics.scorer import Scorer, Scores
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.one_step import read_contract, read_network
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher

log = logging.getLogger(__name__)

Metrics = dict[str, float]
FolderWriter = Callable[[Path], None]


def prepare_reference(manifest: Manifest, teacher: TeacherConfig, evaluation: EvaluationConfig) -> FolderWriter:
    """Prompts and features of real test images and of the teacher's reconstructions of them. Splits stay apart.

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
        log.info("Evaluation reference: %d of %d images of '%s'", len(splits[name]), rows, name)
    return functools.partial(write_reference, splits=splits, key={**reference_key(evaluation, loaded), "data": manifest.key})


@dataclass
class Bench:
    """What all rows of one model share: networks, references, encoded prompts."""

    teacher: Teacher
    scorer: Scorer
    config: EvaluationConfig
    splits: dict[str, SplitReference]
    cond: dict[str, Conditioning] = field(default_factory=dict)
    texts: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What each prompt of the split ``test`` adds to a metric: by row of the table, then by metric."""

    @classmethod
    def load(cls, teacher: TeacherConfig, reference: Path, config: EvaluationConfig, data: str | None = None) -> Bench:
        loaded = load_teacher(teacher)
        key = {**reference_key(config, loaded), **({"data": data} if data else {})}
        bench = cls(loaded, Scorer(config, loaded.device), config, read_reference(reference, key))
        for name, split in bench.splits.items():
            bench.cond[name] = loaded.encode_prompts(split.prompts)
            bench.texts[name] = bench.scorer.text_embeddings(split.prompts)
        return bench

    def denoiser(self) -> Denoiser:
        """The teacher's network as it is now, in the precision in which the evaluation samples."""
        return self.teacher.denoiser().in_bf16(self.config.mixed_precision == "bf16")

    def row(self, split: str, steps: int, contract: Contract, guidance_scale: float = 1.0) -> tuple[Metrics, list[Image.Image]]:
        """Metrics of one number of steps on one split, and the images of the first ``grid_prompts`` prompts."""
        denoiser = self.denoiser()
        if guidance_scale != 1:
            denoiser = denoiser.guided(self.teacher.unconditional(1), guidance_scale)
        batches = generate(
            self.teacher,
            self.cond[split],
            contract.timesteps(steps, self.teacher.process.num_train_timesteps),
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            denoiser=denoiser,
            eta=contract.eta,
            to_clean=contract.only_timestep is not None,
        )
        shown: list[Image.Image] = []
        scores = self.scorer.score_all(watched(batches, shown, self.config.grid_prompts), self.splits[split].prompts)
        metrics = self.metrics_of(split, f"{steps}_steps", scores)
        log.info(
            "%s, %d steps: %s",
            split,
            steps,
            ", ".join(f"{k.split('/')[0]} {v:.2f}" for k, v in metrics.items() if not k.endswith(("_low", "_high"))),
        )
        return metrics, shown

    def metrics_of(self, split: str, row: str, scores: Scores, against: tuple[str, ...] = ("real", "recon")) -> Metrics:
        """Flat metrics ``<name>/<row>`` with ``_low`` and ``_high``. Names begin with ``unseen_`` where the split is ``test_unseen``."""
        prefix = "unseen_" if split == "test_unseen" else ""
        options: dict[str, Any] = {"resamples": self.config.bootstrap, "seed": self.config.seed}
        metrics: Metrics = {}
        for kind in against:
            other = getattr(self.splits[split], kind).features
            distance = frechet_estimate(scores.features, other, paired=True, **options)
            metrics |= self._noted(distance, f"{prefix}{self.scorer.distance}_{kind}", row)
        clip = clip_scores(scores.embeddings, self.texts[split])
        metrics |= self._noted(mean_estimate(clip, **options), f"{prefix}clip_score", row)
        for name, values in {**({"image_quality": scores.quality} if self.config.image_quality else {}), **scores.rewards}.items():
            metrics |= self._noted(mean_estimate(values, **options), f"{prefix}{name}", row)
        return metrics

    def _noted(self, estimate: Estimate, name: str, row: str) -> Metrics:
        """The flat metrics of an estimate, whose parts are kept for comparisons."""
        if estimate.rows is not None and not name.startswith("unseen_"):
            self.rows.setdefault(row, {})[name] = estimate.rows
        return estimate.flat(f"{name}/{row}")

    def prompt_scores(self, steps: Iterable[int]) -> PromptScores:
        """Of these numbers of steps, which were measured: the scores of each prompt."""
        split = self.splits["test"]
        values = {n: self.rows[f"{n}_steps"] for n in steps}
        return PromptScores(split.prompts, identity_of(split, self.config), values)


def watched(batches: Iterable[Tensor], shown: list[Image.Image], n: int) -> Iterable[Tensor]:
    """Pass batches on and keep the first ``n`` images."""
    for batch in batches:
        shown.extend(to_pil(image) for image in batch[: n - len(shown)])
        yield batch


def _evaluate(
    bench: Bench, steps: Iterable[int], contract: Contract, guidance_scale: float = 1.0
) -> tuple[Metrics, Image.Image, FolderWriter]:
    if bench.config.mixed_precision == "bf16":
        bench.teacher.backbone.hold_in(torch.bfloat16)
    metrics: Metrics = {}
    samples: dict[int, list[Image.Image]] = {}
    for n in sorted({*steps, contract.steps}):
        row, samples[n] = bench.row("test", n, contract, guidance_scale)
        metrics |= row
    metrics["samples"] = len(bench.splits["test"])
    if "test_unseen" in bench.splits:
        metrics |= bench.row("test_unseen", contract.steps, contract, guidance_scale)[0]
        metrics["unseen_samples"] = len(bench.splits["test_unseen"])
    prompts = bench.splits["test"].prompts[: bench.config.grid_prompts]
    grid = labelled_grid([(steps_label(n), images) for n, images in samples.items()], prompts)
    return metrics, grid, functools.partial(write_samples, samples=samples, scores=bench.prompt_scores(samples))


def evaluate_teacher(teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig) -> tuple[Metrics, Image.Image, FolderWriter]:
    """The teacher with guidance at each of ``teacher_steps``, and the real images and reconstructions themselves as rows.

    Returns:
        Flat metrics (``fd_efficientnet_lite0_recon/25_steps`` ..., rows ``real`` and ``recon`` besides), the image grid, a writer of
        the images.
    """
    bench = Bench.load(teacher, reference, evaluation)
    metrics, grid, samples = _evaluate(bench, evaluation.teacher_steps, Contract(max(evaluation.teacher_steps)), evaluation.guidance_scale)
    for name, split in bench.splits.items():
        metrics |= bench.metrics_of(name, "recon", split.recon, against=("real",)) | bench.metrics_of(name, "real", split.real, against=())
    return metrics, grid, samples


def evaluate_lora(
    lora: LoRA, teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig
) -> tuple[Metrics, Image.Image, FolderWriter]:
    """A LoRA without guidance, on its contract's grid, at each of ``student_steps``, and at its own number on unseen names.

    Returns:
        Flat metrics (``fd_efficientnet_lite0_recon/4_steps`` with ``_low`` and ``_high``, ``clip_score/4_steps``,
        ``image_quality/4_steps``, ``unseen_...`` at the LoRA's own steps), the image grid, a writer of the images.

    Raises:
        UserError: the LoRA carries no sampling contract, it asks for guidance, or it was trained on other data than the reference's.
    """
    contract = Contract.of(lora)
    bench = Bench.load(teacher, reference, evaluation, lora.metadata.get("data_rows"))
    merge_lora(bench.teacher.backbone.module, lora)
    return _evaluate(bench, evaluation.student_steps, contract)


def evaluate_unet(
    unet: Path, teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig
) -> tuple[Metrics, Image.Image, FolderWriter]:
    """The dedicated one-step UNet at its own time input. As `evaluate_lora`."""
    bench = Bench.load(teacher, reference, evaluation, read_contract(unet)["data_rows"])
    contract = read_network(unet, bench.teacher.backbone)
    return _evaluate(bench, (1,), Contract(1, only_timestep=contract["timesteps"][0]))
