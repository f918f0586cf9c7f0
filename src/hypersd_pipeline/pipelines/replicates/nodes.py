"""The node that repeats the chain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from pydantic import Field

from hypersd_pipeline.config import Strict
from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.io.records import RecordStore
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.ablation.nodes import conditions, frame_of, stage_identity
from hypersd_pipeline.pipelines.evaluation.nodes import evaluate_stage, evaluate_teacher
from hypersd_pipeline.pipelines.tscd.config import StageOverrides, TscdDefaults
from hypersd_pipeline.pipelines.tscd.nodes import distil
from hypersd_pipeline.training.checkpoints import CheckpointStore, fingerprint
from hypersd_pipeline.training.distillation import changed


class ReplicatesConfig(Strict):
    """Attributes: ``seeds``, with each of which the whole chain is trained; data, prompts and noise of the evaluation stay the same."""

    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)


def run_replicates(
    replicates: ReplicatesConfig,
    defaults: TscdDefaults,
    k8: StageOverrides,
    k4: StageOverrides,
    k2: StageOverrides,
    k1: StageOverrides,
    latents: LatentCache,
    teacher: TeacherConfig,
    reference: Path,
    evaluation: EvaluationConfig,
    checkpoints: CheckpointStore,
    records: RecordStore,
) -> pd.DataFrame:
    """Train the four stages with each seed and evaluate each stage; what has a record is not run again.

    Returns:
        A line per figure, as `ablation`'s: the models are ``teacher`` and ``k8`` ... ``k1``.
    """
    shared = conditions(teacher, latents, evaluation)

    def teacher_figures() -> dict[str, float]:
        return evaluate_teacher(teacher, reference, evaluation)[0]

    frames = [frame_of("teacher", 0, records.once("teacher", fingerprint(shared), {}, teacher_figures))]
    for seed in replicates.seeds:
        stages = [changed(stage.apply(defaults), loop={"seed": seed}) for stage in (k8, k4, k2, k1)]
        lora: LoRA | None = None
        for i, stage in enumerate(stages):
            name = f"k{stage.segments} seed {seed}"
            stream = records.stream(name)
            # a finished stage only loads its weights, so that the chain can be walked again for what follows it
            lora, report = distil(latents, teacher, stage, checkpoints, stream, lora)
            stream.flush()

            def figures(lora: LoRA = lora, report: Mapping[str, float] = report) -> dict[str, float]:
                return {**evaluate_stage(lora, teacher, reference, evaluation)[0], **report}

            so_far = [stage_identity(s) for s in stages[: i + 1]]
            frames.append(
                frame_of(f"k{stage.segments}", seed, records.once(name, fingerprint(shared, so_far), {"stage": so_far[-1]}, figures))
            )
    return pd.concat(frames, ignore_index=True)
