"""The chain of stages that makes a challenger."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.experiments.cells import AnyStage
from hypersd_pipeline.files import remove
from hypersd_pipeline.logs import about
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA, combine
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes.distil import distil
from hypersd_pipeline.recipes.feedback import AnnotatedData, train_feedback
from hypersd_pipeline.recipes.one_step import choose_start, make_pairs, train_unified
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig

log = logging.getLogger(__name__)


def train_challenger(
    stages: Mapping[str, AnyStage],
    start: LoRA | None,
    source: AnnotatedData,
    teacher: TeacherConfig,
    evaluation: EvaluationConfig,
    outputs: Outputs,
    folder: Path,
) -> LoRA:
    """Train the stages one after another, and return the last LoRA. A finished stage only loads its weights.

    Args:
        start: what the first stage starts from. None: the teacher.
        outputs: each stage has checkpoints of its own, in a folder beside this one. The metrics of all stages are one curve.
        folder: for the stored pairs of one-step stages.

    Raises:
        UserError: feedback is the first stage of all, or see the recipes.
    """
    lora, tuned, done = start, None, 0
    for model, stage in stages.items():

        def live(values: dict[str, float], step: int, offset: int = done) -> None:
            outputs.metrics(values, offset + step)

        # new data are another training: the one before is left behind, however long it was
        own = Outputs(CheckpointStore(_checkpoints(outputs, model), outputs.checkpoints.keep, restart=True), live, outputs.compute)
        with about(f"retrain: {model}"):
            if isinstance(stage, FeedbackConfig):
                if lora is None:
                    raise UserError(f"retrain: feedback ({model}) needs a LoRA to start from; put a stage of distillation before it.")
                tuned = train_feedback(source, teacher, evaluation, lora, stage, own)[0]
            elif isinstance(stage, OneStepConfig):
                begin = choose_start(lora, tuned, stage) if lora is not None and tuned is not None else lora
                pairs = folder / "pairs" / model
                pairs.mkdir(parents=True, exist_ok=True)
                make_pairs(source.latents, teacher, stage, own, begin)(pairs)
                lora, tuned = train_unified(source.latents, teacher, stage, pairs, own, begin)[0], None
            else:
                lora, tuned = distil(source.latents, teacher, stage, own, lora)[0], None
        done += stage.loop.steps
    assert lora is not None  # a configuration has one stage at least
    return lora if tuned is None else combine(lora, tuned, 1.0)


def forget(stages: Iterable[str], outputs: Outputs) -> None:
    """Delete the checkpoints of the stages, which nobody continues once the challenger is registered."""
    for model in stages:
        if (folder := _checkpoints(outputs, model)).is_dir():
            remove(folder)


def _checkpoints(outputs: Outputs, model: str) -> Path:
    path = outputs.checkpoints.path
    return path.with_name(f"{path.name}_{model}")
