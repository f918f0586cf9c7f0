"""What all rows of an evaluation share, and the evaluations of a teacher, a LoRA and a one-step UNet."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.reference import (
    SPLITS,
    SplitReference,
    make_split,
    read_reference,
    reference_key,
    teachers_way,
    write_reference,
)
from hypersd_pipeline.evaluation.samples import steps_label, write_samples
from hypersd_pipeline.evaluation.scores import PromptScores, identity_of
from hypersd_pipeline.evaluation.scoring import Look, Way, diversity, score_samples
from hypersd_pipeline.metrics.clip_score import clip_scores
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.frechet import Estimate, frechet_estimate, mean_estimate
from hypersd_pipeline.metrics.grids import labelled_grid
from hypersd_pipeline.metrics.scorer import Scorer, Scores
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.one_step import read_contract, read_network
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.processes import Place, on_processes

log = logging.getLogger(__name__)

Metrics = dict[str, float]
FolderWriter = Callable[[Path], None]


def _load(config: TeacherConfig) -> Teacher:
    """The teacher, with its VAE laid out as the device decodes fastest. That changes the last digits of an image and nothing else."""
    loaded = load_teacher(config)
    if loaded.device.type == "cpu":
        loaded.vae.to(memory_format=torch.channels_last)  # two thirds of the time
    return loaded


@on_processes
def prepare_reference(manifest: Manifest, teacher: TeacherConfig, evaluation: EvaluationConfig, place: Place | None = None) -> FolderWriter:
    """Prompts and features of real test images, of the teacher's reconstructions of them, and of its own samples. Splits stay apart.

    Returns:
        A writer of the folder ``evaluation_reference``.

    Args:
        place: see `on_processes`. The other evaluations have it too.

    Raises:
        UserError: the data set has no split ``test``, or fewer than four rows in a split.
    """
    loaded = _load(teacher)
    key = {**reference_key(evaluation, loaded), "data": manifest.key}
    if evaluation.mixed_precision == "bf16":
        loaded.backbone.hold_in(torch.bfloat16)
    scorer = Scorer(evaluation, loaded.device)
    splits = {}
    for name, n in zip(SPLITS, (evaluation.samples, evaluation.unseen_samples), strict=True):
        source = evaluation.split if name == "test" else name
        rows = len(manifest.splits.get(source, ()))
        if name == "test_unseen" and not rows:
            continue  # other data sets have no such split
        if rows < 4:
            raise UserError(
                f"manifest: the split '{source}' has {rows} good rows, the evaluation needs 4 at least; add rows to it in "
                f"data.source and run data_prep again."
            )
        splits[name] = make_split(manifest, source, n, loaded, scorer, evaluation)
        log.info("Evaluation reference: %d of %d images of '%s'", len(splits[name]), rows, source)
    return functools.partial(write_reference, splits=splits, key=key)


@dataclass
class Bench:
    """What all rows of one model share: networks, references, encoded prompts."""

    teacher: Teacher
    scorer: Scorer
    config: EvaluationConfig
    splits: dict[str, SplitReference]
    cond: dict[str, Conditioning] = field(default_factory=dict)
    rows: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What each prompt of the split ``test`` adds to a metric: by row of the table, then by metric."""

    @classmethod
    def load(cls, teacher: TeacherConfig, reference: Path, config: EvaluationConfig, data: str | None = None) -> Bench:
        loaded = _load(teacher)
        key = {**reference_key(config, loaded), **({"data": data} if data else {})}
        bench = cls(loaded, Scorer(config, loaded.device), config, read_reference(reference, key))
        for name, split in bench.splits.items():
            bench.cond[name] = loaded.encode_prompts(split.prompts)
        return bench

    def denoiser(self) -> Denoiser:
        """The teacher's network as it is now, in the precision in which the evaluation samples."""
        return self.teacher.denoiser().in_bf16(self.config.mixed_precision == "bf16")

    def row(
        self, split: str, steps: int, contract: Contract, guidance_scale: float = 1.0, look: Look = lambda *batch: None
    ) -> tuple[Metrics, list[Image.Image]]:
        """Metrics of one number of steps on one split, and the images of the first ``grid_prompts`` prompts.

        Several processes sample and score a share of the batches each. All of them have the same metrics afterwards.

        Args:
            look: see `score_samples`.
        """
        way = Way(contract, steps, guidance_scale)
        return self._row(split, way, *score_samples(self.teacher, self.scorer, self.config, *self._prompts(split), way, look))

    def teachers_row(self, split: str) -> tuple[Metrics, list[Image.Image]]:
        """As `row`, of the teacher's samples in the reference."""
        reference = self.splits[split]
        return self._row(split, teachers_way(self.config), reference.teacher, reference.shown)

    def _prompts(self, split: str) -> tuple[list[str], Conditioning]:
        return self.splits[split].prompts, self.cond[split]

    def _row(self, split: str, way: Way, scores: Scores, shown: list[Image.Image]) -> tuple[Metrics, list[Image.Image]]:
        label, options = f"{way.steps}_steps", {"resamples": self.config.bootstrap, "seed": self.config.seed}
        metrics = self.metrics_of(split, label, scores)
        apart = 1 - F.cosine_similarity(scores.features, self.splits[split].teacher.features, dim=-1)
        metrics |= self._noted(mean_estimate(apart, **options), f"{_prefix(split)}teacher_distance", label)
        if split == "test":
            varied = diversity(self.teacher, self.scorer, self.config, scores.features, self.cond[split], way)
            metrics |= mean_estimate(varied, **options).flat(f"diversity/{label}")
        if distributed.is_first():
            values = ", ".join(f"{k.split('/')[0]} {v:.2f}" for k, v in metrics.items() if not k.endswith(("_low", "_high")))
            log.info("%s, %d steps: %s", split, way.steps, values)
        return metrics, shown

    def metrics_of(self, split: str, row: str, scores: Scores, against: tuple[str, ...] = ("real", "recon")) -> Metrics:
        """Flat metrics ``<name>/<row>`` with ``_low`` and ``_high``. Names begin with ``unseen_`` where the split is ``test_unseen``."""
        prefix = _prefix(split)
        options: dict[str, Any] = {"resamples": self.config.bootstrap, "seed": self.config.seed}
        metrics: Metrics = {}
        for kind in against:
            other = getattr(self.splits[split], kind).features
            distance = frechet_estimate(scores.features, other, paired=True, **options)
            metrics |= self._noted(distance, f"{prefix}{self.scorer.distance}_{kind}", row)
        clip = clip_scores(scores.embeddings, self.splits[split].texts)
        metrics |= self._noted(mean_estimate(clip, **options), f"{prefix}clip_score", row)
        for name, values in {**({"image_quality": scores.quality} if self.config.image_quality else {}), **scores.rewards}.items():
            metrics |= self._noted(mean_estimate(values, **options), f"{prefix}{name}", row)
        for kind in against:
            other = getattr(self.splits[split], kind).crops
            distance = frechet_estimate(scores.crops, other, paired=True, **options)
            metrics |= self._noted(distance, f"{prefix}{self.scorer.distance}_crop_{kind}", row)
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


def _prefix(split: str) -> str:
    return "unseen_" if split == "test_unseen" else ""


def _evaluate(
    bench: Bench, steps: Iterable[int], contract: Contract, row: Callable[[str, int], tuple[Metrics, list[Image.Image]]]
) -> tuple[Metrics, Image.Image, FolderWriter]:
    if bench.config.mixed_precision == "bf16":
        bench.teacher.backbone.hold_in(torch.bfloat16)
    metrics: Metrics = {}
    samples: dict[int, list[Image.Image]] = {}
    for n in sorted({*steps, contract.steps}):
        values, samples[n] = row("test", n)
        metrics |= values
    metrics["samples"] = len(bench.splits["test"])
    if "test_unseen" in bench.splits:
        metrics |= row("test_unseen", contract.steps)[0]
        metrics["unseen_samples"] = len(bench.splits["test_unseen"])
    prompts = bench.splits["test"].prompts[: bench.config.grid_prompts]
    grid = labelled_grid([(steps_label(n), images) for n, images in samples.items()], prompts)
    return metrics, grid, functools.partial(write_samples, samples=samples, scores=bench.prompt_scores(samples))


@on_processes
def evaluate_teacher(
    teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig, place: Place | None = None
) -> tuple[Metrics, Image.Image, FolderWriter]:
    """The teacher with guidance at each of ``teacher_steps``, and the real images and reconstructions themselves as rows.

    Its samples at the most steps are those of the reference.

    Returns:
        Flat metrics (``fd_efficientnet_lite0_recon/25_steps`` ..., rows ``real`` and ``recon`` besides), the image grid, a writer of
        the images.
    """
    bench = Bench.load(teacher, reference, evaluation)
    best = teachers_way(evaluation)

    def row(split: str, steps: int) -> tuple[Metrics, list[Image.Image]]:
        return bench.teachers_row(split) if steps == best.steps else bench.row(split, steps, best.contract, best.guidance_scale)

    metrics, grid, samples = _evaluate(bench, evaluation.teacher_steps, best.contract, row)
    for name, split in bench.splits.items():
        metrics |= bench.metrics_of(name, "recon", split.recon, against=("real",)) | bench.metrics_of(name, "real", split.real, against=())
    return metrics, grid, samples


@on_processes
def evaluate_lora(
    lora: LoRA, teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig, place: Place | None = None
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
    return _evaluate(bench, evaluation.student_steps, contract, lambda split, n: bench.row(split, n, contract))


@on_processes
def evaluate_unet(
    unet: Path, teacher: TeacherConfig, reference: Path, evaluation: EvaluationConfig, place: Place | None = None
) -> tuple[Metrics, Image.Image, FolderWriter]:
    """The dedicated one-step UNet at its own time input. As `evaluate_lora`."""
    bench = Bench.load(teacher, reference, evaluation, read_contract(unet)["data_rows"])
    contract = Contract(1, only_timestep=read_network(unet, bench.teacher.backbone)["timesteps"][0])
    return _evaluate(bench, (1,), contract, lambda split, n: bench.row(split, n, contract))
