"""Nodes of the ablation: plan the cells, run or resume them, report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.io.records import RecordStore
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.pipelines.ablation.config import AblationConfig, Cell, plan, prepared_forwards, step_forwards
from hypersd_pipeline.pipelines.dmd.config import OneStepConfig
from hypersd_pipeline.pipelines.dmd.nodes import unify
from hypersd_pipeline.pipelines.dmd.pairs import make_pairs
from hypersd_pipeline.pipelines.evaluation.nodes import evaluate_stage, evaluate_teacher
from hypersd_pipeline.pipelines.evaluation.results import long_table
from hypersd_pipeline.pipelines.tscd.config import StageOverrides, TscdDefaults
from hypersd_pipeline.pipelines.tscd.nodes import distil
from hypersd_pipeline.training.checkpoints import CheckpointStore, content_hashes, fingerprint
from hypersd_pipeline.training.distillation import StageConfig


def plan_cells(
    ablation: AblationConfig,
    defaults: TscdDefaults,
    k8: StageOverrides,
    k4: StageOverrides,
    k2: StageOverrides,
    k1: StageOverrides,
    lcm: StageOverrides,
    tcd: StageOverrides,
    pcm: StageOverrides,
    progressive_k8: StageOverrides,
    progressive_k4: StageOverrides,
    progressive_k2: StageOverrides,
    progressive_k1: StageOverrides,
    unified: OneStepConfig,
    dmd2: OneStepConfig,
    dmd: OneStepConfig,
) -> list[Cell]:
    """Every cell with its stages, each with as many steps as its share of the budget pays for."""
    tscd: dict[int, StageConfig] = {stage.segments: stage.apply(defaults) for stage in (k8, k4, k2, k1)}
    progressive = (progressive_k8, progressive_k4, progressive_k2, progressive_k1)
    baselines = {"LCM": (lcm,), "TCD": (tcd,), "PCM": (pcm,), "progressive": progressive}
    methods = {name: tuple(s.apply(defaults) for s in stages) for name, stages in baselines.items()}
    return plan(ablation, tscd, methods, unified, {"DMD2": dmd2, "DMD without TSCD": dmd})


def run_cells(
    cells: list[Cell],
    ablation: AblationConfig,
    latents: LatentCache,
    teacher: TeacherConfig,
    reference: Path,
    evaluation: EvaluationConfig,
    checkpoints: CheckpointStore,
    records: RecordStore,
) -> pd.DataFrame:
    """Train and evaluate each cell with each seed, seed by seed, each in an MLflow run of its own.

    What has a record under the same configuration, data and reference is not run again; stages that cells have in common are trained once.

    Returns:
        A line per figure: model (the cell), seed, row (``4_steps``), split, metric, samples, value, low, high; the teacher is a model too.
    """
    shared = conditions(teacher, latents, evaluation)

    def teacher_figures() -> dict[str, float]:
        return evaluate_teacher(teacher, reference, evaluation)[0]

    frames = [frame_of("teacher", 0, records.once("teacher", fingerprint(shared), {}, teacher_figures))]
    for seed in ablation.seeds:
        for cell in (cell.seeded(seed) for cell in cells):
            name = f"{cell.name} seed {seed}"
            stages = [stage_identity(stage) for stage in cell.stages]

            def figures(cell: Cell = cell, name: str = name) -> dict[str, float]:
                return _run(cell, name, latents, teacher, reference, evaluation, checkpoints, records)

            frames.append(frame_of(cell.name, seed, records.once(name, fingerprint(shared, stages), {"stages": stages}, figures)))
    return pd.concat(frames, ignore_index=True)


def _run(
    cell: Cell,
    name: str,
    latents: LatentCache,
    teacher: TeacherConfig,
    reference: Path,
    evaluation: EvaluationConfig,
    checkpoints: CheckpointStore,
    records: RecordStore,
) -> dict[str, float]:
    lora: LoRA | None = None
    stream, forwards, images, done = records.stream(name), 0.0, 0, 0
    for i, stage in enumerate(cell.stages):

        def live(values: Mapping[str, float], step: int, first: int = done) -> None:
            stream(values, first + step)

        if isinstance(stage, OneStepConfig):
            folder = records.path / "pairs" / re.sub("[^A-Za-z0-9]+", "_", cell.name)
            folder.mkdir(parents=True, exist_ok=True)
            make_pairs(latents, teacher, stage, lora)(folder)
            before = [s for s in cell.stages[:i] if isinstance(s, StageConfig)]
            lora, report = unify(latents, teacher, stage, before[-1] if before else None, folder, checkpoints, live, lora)
        else:
            lora, report = distil(latents, teacher, stage, checkpoints, live, lora)
        done += stage.loop.steps
        forwards += stage.loop.steps * step_forwards(stage, cell.batch, report["encoder_share"]) + prepared_forwards(stage, cell.batch)
        images += stage.loop.steps * stage.loop.batch_size
        stream.flush()
    assert lora is not None
    metrics = evaluate_stage(lora, teacher, reference, evaluation)[0]
    return {**metrics, "trained_updates": done, "trained_images": images, "trained_forwards": forwards}


def conditions(teacher: TeacherConfig, latents: LatentCache, evaluation: EvaluationConfig) -> list[Any]:
    """What a record depends on besides its stages: the teacher's weights, the data, and how it is evaluated."""
    weights = load_teacher(teacher, parts=()).content_hash("unet")
    return [evaluation.model_dump(mode="json"), teacher.model_dump(mode="json"), weights, latents.key]


def stage_identity(stage: StageConfig | OneStepConfig) -> dict[str, Any]:
    """What a stage's weights depend on, of its configuration."""
    judges = {"judges": content_hashes(stage.judge_files())} if isinstance(stage, OneStepConfig) and stage.rewards else {}
    return {**stage.model_dump(mode="json"), "loop": stage.loop.identity(), **judges}


def frame_of(name: str, seed: int, record: Mapping[str, float]) -> pd.DataFrame:
    """A record's metrics as lines of the table."""
    frame = long_table({name: record})
    frame.insert(1, "seed", seed)
    return frame
