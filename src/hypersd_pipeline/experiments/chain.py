"""A cell times a seed: the one runner of chains besides the main job. What has a record is not run again."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from hypersd_pipeline.evaluation.bench import evaluate_lora, evaluate_teacher, evaluate_unet
from hypersd_pipeline.evaluation.results import long_table
from hypersd_pipeline.experiments.cells import Cell, step_forwards
from hypersd_pipeline.files import content_hashes, fingerprint
from hypersd_pipeline.logs import about
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA, combine
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.recipes.distil import distil
from hypersd_pipeline.recipes.feedback import AnnotatedData, train_feedback
from hypersd_pipeline.recipes.one_step import choose_start, make_pairs, train_unet, train_unified
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.recipes.tradeoff import measure_tradeoff
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig, StageConfig
from hypersd_pipeline.training.cost import prepared_forwards
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.processes import Place

Metrics = dict[str, float]

log = logging.getLogger(__name__)


class Records(Protocol):
    """Where finished jobs are kept, one record each. `io.records.RecordStore` is one.

    Attributes:
        path: a folder, for what jobs leave besides.
    """

    path: Path

    def get(self, name: str, key: str) -> dict[str, Any] | None:
        """The record of a job that was made under this key, or None."""
        ...

    def once(self, name: str, key: str, parameters: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of a job, made now unless it was made before."""
        ...

    def stream(self, name: str) -> AbstractContextManager[Callable[[Mapping[str, float], int], None]]:
        """Where the live metrics of a job go."""
        ...


@dataclass(frozen=True)
class Setting:
    """What all cells and seeds share."""

    source: AnnotatedData
    teacher: TeacherConfig
    reference: Path
    evaluation: EvaluationConfig
    checkpoints: CheckpointStore
    records: Records
    compute: ComputeConfig | None = None

    @property
    def place(self) -> Place | None:
        """Where the processes of an evaluation meet."""
        return None if self.compute is None else Place(self.checkpoints.path, self.compute)

    def conditions(self) -> list[Any]:
        """What a record depends on besides its stages: the teacher's weights, the data, and how it is evaluated."""
        weights = load_teacher(self.teacher, parts=()).content_hash("backbone")
        return [self.evaluation.model_dump(mode="json"), self.teacher.model_dump(mode="json"), weights, self.source.latents.key]


def run_cells(cells: Sequence[Cell], seeds: Sequence[int], setting: Setting) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train and evaluate each cell with each seed, seed by seed, each record in an MLflow run of its own.

    Stages that cells have in common are trained once.

    Returns:
        A line per metric: model (or cell), seed, row (``4_steps``), split, metric, samples, value, low, high. The teacher is a model too.
        A line per model, seed and weight of the feedback LoRA, where a cell has feedback (see `measure_tradeoff`).
    """
    shared = setting.conditions()

    def teacher_metrics() -> Metrics:
        return evaluate_teacher(setting.teacher, setting.reference, setting.evaluation, setting.place)[0]

    frames = [frame_of("teacher", 0, setting.records.once("teacher", fingerprint(shared), {}, teacher_metrics))]
    tradeoff: list[dict[str, Any]] = []
    for seed in seeds:
        for cell in cells:
            for model, record in Chain(cell.seeded(seed), seed, setting, shared).run().items():
                frames.append(frame_of(model, seed, record))
                tradeoff += [{"model": model, **line} for line in tradeoff_lines(seed, record)]
    return pd.concat(frames, ignore_index=True), pd.DataFrame(tradeoff)


class Chain:
    """The stages of one cell with one seed.

    A finished stage only loads its weights, so that the chain can be walked again for what follows it.
    """

    def __init__(self, cell: Cell, seed: int, setting: Setting, shared: list[Any]) -> None:
        self.cell, self.seed, self.setting = cell, seed, setting
        self.identities = {model: stage_identity(stage) for model, stage in cell.stages.items()}
        self.shared = shared
        self.lora: LoRA | None = None
        self.feedback: LoRA | None = None
        self.spent = {"trained_updates": 0.0, "trained_images": 0.0, "trained_forwards": 0.0}

    def run(self) -> dict[str, dict[str, float]]:
        """Records by model, or by the cell's name. Nothing is walked where all of them exist."""
        models = list(self.cell.stages)
        recorded = models if self.cell.each else models[-1:]
        found = {model: self.setting.records.get(self._name(model), self._key(model)) for model in recorded}
        for model in (name for name, record in found.items() if record):
            log.info("%s: done before", self._name(model))
        if all(record is not None for record in found.values()):
            return {self._label(model): record for model, record in found.items() if record is not None}
        records = {}
        for model, stage in self.cell.stages.items():
            with about(self._name(model) if self.cell.each else f"{self._name(model)}: {model}"):
                evaluate = self._train(model, stage)
                if model in recorded:
                    parameters = {"stages": [self.identities[m] for m in models[: models.index(model) + 1]]}
                    records[self._label(model)] = self.setting.records.once(self._name(model), self._key(model), parameters, evaluate)
        return records

    def _label(self, model: str) -> str:
        return model if self.cell.each else self.cell.name

    def _name(self, model: str) -> str:
        return f"{self._label(model)} seed {self.seed}"

    def _key(self, model: str) -> str:
        """All stages up to this one."""
        models = list(self.cell.stages)
        return fingerprint(self.shared, [self.identities[m] for m in models[: models.index(model) + 1]])

    def _train(self, model: str, stage: StageConfig) -> Any:
        """Train a stage. Returns what evaluates it."""
        s, first = self.setting, int(self.spent["trained_updates"])
        offset = 0 if self.cell.each else first
        with s.records.stream(self._name(model)) as stream:

            def live(values: Mapping[str, float], step: int) -> None:
                stream(values, offset + step)

            outputs = Outputs(s.checkpoints, live, s.compute)
            if isinstance(stage, FeedbackConfig):
                evaluate, report = self._train_feedback(stage, outputs)
            elif isinstance(stage, OneStepConfig):
                evaluate, report = self._train_one_step(model, stage, outputs)
            else:
                self.lora, report = distil(s.source.latents, s.teacher, stage, outputs, self.lora)
                evaluate = self._evaluation_of(self.lora)
        self._spend(stage, report)
        spent = dict(self.spent)
        return lambda: {**evaluate(), **report, **spent}

    def _evaluation_of(self, lora: LoRA) -> Any:
        s = self.setting
        return lambda: evaluate_lora(lora, s.teacher, s.reference, s.evaluation, s.place)[0]

    def _train_feedback(self, stage: FeedbackConfig, outputs: Outputs) -> tuple[Any, Metrics]:
        s, lora = self.setting, self.lora
        assert lora is not None
        tuned, report = train_feedback(s.source, s.teacher, s.evaluation, lora, stage, outputs)
        self.feedback = tuned

        def evaluate() -> Metrics:
            """Of both LoRAs together, and the trade-off."""
            lines = measure_tradeoff(s.source, s.teacher, s.reference, s.evaluation, lora, tuned, stage, s.place)[1]
            flat = {f"{w}/{name}": value for w, line in lines.items() if isinstance(line, dict) for name, value in line.items()}
            return {**self._evaluation_of(combine(lora, tuned, 1.0))(), **flat}

        return evaluate, report

    def _train_one_step(self, model: str, stage: OneStepConfig, outputs: Outputs) -> tuple[Any, Metrics]:
        s = self.setting
        start = self.lora if self.lora is None or self.feedback is None else choose_start(self.lora, self.feedback, stage)
        pairs = self._folder("pairs", model)
        make_pairs(s.source.latents, s.teacher, stage, outputs, start)(pairs)
        if model != "unet":
            lora, report = train_unified(s.source.latents, s.teacher, stage, pairs, outputs, start)
            return self._evaluation_of(lora), report
        write, report = train_unet(s.source.latents, s.teacher, stage, pairs, outputs, start)
        folder = self._folder("unets", model)
        write(folder)
        return lambda: evaluate_unet(folder, s.teacher, s.reference, s.evaluation, s.place)[0], report

    def _folder(self, kind: str, model: str) -> Path:
        cell = re.sub("[^A-Za-z0-9]+", "_", self.cell.name)
        folder = self.setting.records.path / kind / f"{cell}_seed_{self.seed}_{model}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _spend(self, stage: StageConfig, report: Metrics) -> None:
        batch, steps = self.cell.batch, stage.loop.steps
        self.spent["trained_updates"] += steps
        self.spent["trained_images"] += steps * stage.loop.batch_size
        self.spent["trained_forwards"] += steps * step_forwards(stage, batch, report["encoder_share"]) + prepared_forwards(stage, batch)


def stage_identity(stage: StageConfig) -> dict[str, Any]:
    """What a stage's weights and its evaluation depend on, of its configuration."""
    return {**stage.model_dump(mode="json"), "loop": stage.loop.identity(), "judges": content_hashes(stage.judge_files())}


def frame_of(name: str, seed: int, record: Mapping[str, float]) -> pd.DataFrame:
    """A record's metrics as lines of the table."""
    frame = long_table({name: record})
    frame.insert(1, "seed", seed)
    return frame


def tradeoff_lines(seed: int, record: Mapping[str, float]) -> list[dict[str, Any]]:
    """A record's metrics by weight of the feedback LoRA (``w_0.50/distance``), a line per weight. None where it has no feedback."""
    lines: dict[str, dict[str, Any]] = {}
    for name, value in record.items():
        if match := re.fullmatch(r"w_(\d+\.\d+)/(.+)", name):
            lines.setdefault(match[1], {"seed": seed, "weight": float(match[1])})[match[2]] = value
    return [lines[weight] for weight in sorted(lines, key=float)]


def feedback_lines(tradeoff: pd.DataFrame) -> pd.DataFrame:
    """The trade-off at the last weight of each model as further lines of the table, in the row ``feedback``. None where there is none."""
    lines = []
    for (model, seed), part in tradeoff.groupby(["model", "seed"], sort=False) if len(tradeoff) else ():
        values = part.sort_values("weight").iloc[-1].drop(["model", "seed", "weight"]).dropna()
        common = {"model": model, "seed": seed, "row": "feedback", "split": "test"}
        lines += [{**common, "metric": metric, "value": float(value)} for metric, value in values.items()]
    return pd.DataFrame(lines)
