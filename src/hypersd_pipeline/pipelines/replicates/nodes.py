"""The node that repeats the chain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from hypersd_pipeline.config import Strict
from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.io.metrics import MetricStream
from hypersd_pipeline.io.records import RecordStore
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA, combine
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.ablation.nodes import conditions, frame_of, stage_identity
from hypersd_pipeline.pipelines.ablation.report import plain, student_interval
from hypersd_pipeline.pipelines.dmd.config import OneStepConfig
from hypersd_pipeline.pipelines.dmd.nodes import choose_start, train_unet, unify
from hypersd_pipeline.pipelines.dmd.pairs import make_pairs
from hypersd_pipeline.pipelines.evaluation.nodes import evaluate_stage, evaluate_teacher, evaluate_unet
from hypersd_pipeline.pipelines.feedback.config import FeedbackConfig
from hypersd_pipeline.pipelines.feedback.nodes import measure_tradeoff, train_feedback
from hypersd_pipeline.pipelines.tscd.config import StageOverrides, TscdDefaults
from hypersd_pipeline.pipelines.tscd.nodes import distil
from hypersd_pipeline.training.checkpoints import CheckpointStore, content_hashes, fingerprint
from hypersd_pipeline.training.distillation import StageConfig, changed


class ReplicatesConfig(Strict):
    """Attributes: ``seeds``, with each of which the whole chain is trained; data, prompts and noise of the evaluation stay the same."""

    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)


@dataclass(frozen=True)
class Setting:
    """What all seeds share."""

    manifest: Manifest
    data: DataConfig
    latents: LatentCache
    teacher: TeacherConfig
    reference: Path
    evaluation: EvaluationConfig
    checkpoints: CheckpointStore
    records: RecordStore

    def evaluate(self, lora: LoRA) -> dict[str, float]:
        """A LoRA's figures."""
        return evaluate_stage(lora, self.teacher, self.reference, self.evaluation)[0]


@dataclass
class Chain:
    """The chain of one seed. A finished stage only loads its weights, so that the chain can be walked again for what follows it."""

    setting: Setting
    shared: list[Any]
    seed: int
    frames: list[pd.DataFrame] = field(default_factory=list)
    tradeoff: list[dict[str, Any]] = field(default_factory=list)
    so_far: list[Any] = field(default_factory=list)

    def tscd(self, stages: list[StageConfig]) -> LoRA:
        """The stages in order; returns the last one's LoRA."""
        s, lora = self.setting, None
        for stage in (changed(stage, loop={"seed": self.seed}) for stage in stages):
            with self._stream(f"k{stage.segments}") as stream:
                lora, report = distil(s.latents, s.teacher, stage, s.checkpoints, stream, lora)
            self._keep(f"k{stage.segments}", stage_identity(stage), report, partial(s.evaluate, lora))
        assert lora is not None
        return lora

    def feedback(self, lora: LoRA, config: FeedbackConfig) -> LoRA:
        """The feedback LoRA on top of ``lora``; its record has the figures of both together, and the trade-off."""
        s, stage = self.setting, changed(config, loop={"seed": self.seed})
        with self._stream("feedback") as stream:
            tuned, report = train_feedback(s.manifest, s.data, s.latents, s.teacher, s.evaluation, lora, stage, s.checkpoints, stream)

        def figures() -> dict[str, float]:
            lines = measure_tradeoff(s.manifest, s.data, s.latents, s.teacher, s.reference, s.evaluation, lora, tuned, stage)[1]
            flat = {f"{w}/{name}": value for w, line in lines.items() if isinstance(line, dict) for name, value in line.items()}
            return {**s.evaluate(combine(lora, tuned, 1.0)), **flat}

        identity = {**stage.model_dump(mode="json"), "judges": content_hashes(stage.judge_files())}
        record = self._keep("feedback", identity, report, figures)
        for weight in sorted({0.0, *stage.merge_weights}):
            prefix = f"w_{weight:.2f}/"
            line = {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}
            self.tradeoff.append({"seed": self.seed, "weight": weight, **line})
        return tuned

    def unified(self, start: LoRA, stage: OneStepConfig, consistency: StageConfig) -> None:
        """The unified LoRA."""
        s, stage = self.setting, changed(stage, loop={"seed": self.seed})
        pairs = self._pairs("unified", stage, start)
        with self._stream("unified") as stream:
            lora, report = unify(s.latents, s.teacher, stage, consistency, pairs, s.checkpoints, stream, start)
        self._keep("unified", stage_identity(stage), report, lambda: s.evaluate(lora))

    def unet(self, start: LoRA, stage: OneStepConfig) -> None:
        """The dedicated one-step UNet."""
        s, stage = self.setting, changed(stage, loop={"seed": self.seed})
        pairs = self._pairs("unet", stage, start)
        with self._stream("unet") as stream:
            write, report = train_unet(s.latents, s.teacher, stage, pairs, s.checkpoints, stream, start)
        folder = self._folder("unets")
        write(folder)
        self._keep("unet", stage_identity(stage), report, lambda: evaluate_unet(folder, s.teacher, s.reference, s.evaluation)[0])

    def _pairs(self, name: str, stage: OneStepConfig, start: LoRA) -> Path:
        folder = self._folder(f"pairs_{name}")
        make_pairs(self.setting.latents, self.setting.teacher, stage, start)(folder)
        return folder

    def _folder(self, name: str) -> Path:
        folder = self.setting.records.path / name / f"seed_{self.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _stream(self, model: str) -> MetricStream:
        return self.setting.records.stream(f"{model} seed {self.seed}")

    def _keep(self, model: str, stage: Any, report: Mapping[str, float], figures: Callable[[], dict[str, float]]) -> dict[str, float]:
        self.so_far.append(stage)
        key = fingerprint(self.shared, self.so_far)
        record = self.setting.records.once(f"{model} seed {self.seed}", key, {"stage": stage}, lambda: {**figures(), **report})
        self.frames.append(frame_of(model, self.seed, record))
        return record


def run_replicates(
    replicates: ReplicatesConfig,
    defaults: TscdDefaults,
    k8: StageOverrides,
    k4: StageOverrides,
    k2: StageOverrides,
    k1: StageOverrides,
    feedback: FeedbackConfig,
    unified: OneStepConfig,
    unet: OneStepConfig,
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    teacher: TeacherConfig,
    reference: Path,
    evaluation: EvaluationConfig,
    checkpoints: CheckpointStore,
    records: RecordStore,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train the whole chain with each seed and evaluate each of its stages; what has a record is not run again.

    Returns:
        A line per figure, as `ablation`'s: the models are ``teacher``, ``k8`` ... ``k1``, ``feedback`` (with k1), ``unified``, ``unet``.
        A line per seed and weight of the feedback LoRA, as `measure_tradeoff`'s.
    """
    setting = Setting(manifest, data, latents, teacher, reference, evaluation, checkpoints, records)
    shared = conditions(teacher, latents, evaluation)

    def teacher_figures() -> dict[str, float]:
        return evaluate_teacher(teacher, reference, evaluation)[0]

    tradeoff: list[dict[str, Any]] = []
    frames = [frame_of("teacher", 0, records.once("teacher", fingerprint(shared), {}, teacher_figures))]
    for seed in replicates.seeds:
        chain = Chain(setting, shared, seed)
        lora = chain.tscd([stage.apply(defaults) for stage in (k8, k4, k2, k1)])
        tuned = chain.feedback(lora, feedback)
        chain.unified(choose_start(lora, tuned, unified), unified, changed(k1.apply(defaults), loop={"seed": seed}))
        chain.unet(choose_start(lora, tuned, unet), unet)
        frames += chain.frames
        tradeoff += chain.tradeoff
    return pd.concat(frames, ignore_index=True), pd.DataFrame(tradeoff)


def feedback_table(tradeoff: pd.DataFrame) -> str:
    """Markdown: a line per figure, a column per weight, and how the last weight differs from 0 with the same seed.

    Means over the seeds and, from two seeds on, Student's 95 % intervals.
    """
    weights, figures = sorted(tradeoff.weight.unique()), [name for name in tradeoff.columns if name not in ("seed", "weight")]
    head = ["figure", *(f"feedback x {weight:g}" for weight in weights), f"x {weights[-1]:g} minus x {weights[0]:g}"]
    first, last = (tradeoff[tradeoff.weight == weight].set_index("seed") for weight in (weights[0], weights[-1]))
    lines = [head, ["-"] * len(head)]
    for name in figures:
        cells = [student_interval(tradeoff[tradeoff.weight == weight][name]) for weight in weights]
        cells.append(student_interval(last[name] - first[name]))
        lines.append([name, *(f"{mean:.4g}" + ("" if half is None else f" ± {plain(half)}") for mean, half in cells)])
    return "\n".join("|" + "|".join(line) + "|" for line in lines) + "\n"
