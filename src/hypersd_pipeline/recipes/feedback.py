"""Feedback learning: a LoRA on top of a distilled one, and its merges at several weights (Hyper-SD section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.evaluation.probe import Judges, Probe
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.features import load_features
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.lora import LoRA, combine, lora_key, merge_lora
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.perception.annotations import AnnotatedSplit
from hypersd_pipeline.perception.protocol import PerceptualModel
from hypersd_pipeline.recipes.launch import on_ranks
from hypersd_pipeline.recipes.stage import Outputs, context_of, hold_frozen, run_stage, stage_identity
from hypersd_pipeline.training.config import FeedbackConfig
from hypersd_pipeline.training.distributed import by_first
from hypersd_pipeline.training.guard import Guard
from hypersd_pipeline.training.loop import make_accelerator

STUDENT = "feedback"
"""The adapter that is trained. With it off, the network is the distilled model."""


@dataclass(frozen=True)
class AnnotatedData:
    """The data set with its instance masks, and its cached latents."""

    manifest: Manifest
    data: DataConfig
    latents: LatentCache


@on_ranks
def train_feedback(
    source: AnnotatedData, teacher: TeacherConfig, evaluation: EvaluationConfig, lora: LoRA, stage: FeedbackConfig, outputs: Outputs
) -> tuple[LoRA, dict[str, float]]:
    """Train the feedback LoRA on the model that ``lora`` makes of the teacher. That LoRA stays as it is.

    Returns:
        The feedback LoRA alone, and the report: the loop's metrics, the guard's first and last measurement (``before/...``, ``after/...``)
        and ``ended_by_guard``.

    Raises:
        UserError: weights of a reward or of the perceptual model are missing, or the data set has no instance masks.
    """
    accelerator = make_accelerator(stage.loop)
    device, latents = accelerator.device, source.latents
    judges = load_judges(stage, device)
    perceptual = None if stage.perceptual is None else stage.perceptual.load(device)
    model = load_teacher(teacher, parts=("backbone", "vae"), device=device)
    latents.require_teacher(model)
    adapters = feedback_adapters(model, lora, stage)
    student, weights = adapters.denoiser(STUDENT), adapters.parameters(STUDENT)
    probe = guard_probe(model, judges, evaluation, stage, latents)
    bf16 = stage.loop.mixed_precision == "bf16"
    guard = Guard(
        stage.guard,
        lambda: probe.measure(student.in_bf16(bf16), adapters.denoiser(None).in_bf16(bf16)),
        weights,
        by_first(outputs.metrics),
        last=stage.loop.steps,
        scores=lambda: probe.held_out,
    )
    rewards = [(term.reward, reward) for term, (reward, _) in zip(stage.rewards, judges.trained, strict=True)]
    annotated = _annotated(source, stage, model, perceptual)
    report = run_stage(
        "feedback",
        stage,
        context_of(stage, model, adapters, latents, student, annotated=annotated, perceptual=perceptual, rewards=rewards),
        outputs,
        accelerator,
        parameters=weights,
        identity=stage_identity(stage, model, latents, lora, "feedback"),
        state={"adapters": adapters, "guard": guard},
        ready=lambda: adapters.use(STUDENT),
        finished=guard,
    )
    metadata = {**lora.metadata, "method": "feedback learning (Hyper-SD, arXiv 2404.13686, section 3.2); add to the LoRA it was trained on"}
    return adapters.export(STUDENT, {**metadata, "trained_on": lora_key(lora) or ""}), {**report, **guard.metrics_of_ends()}


def load_judges(stage: FeedbackConfig, device: torch.device) -> Judges:
    """The rewards of a stage. Raises UserError for missing weights, and for a held-out reward among those trained on."""
    from hypersd_pipeline.rewards import load_reward

    trained = [(load_reward(term.reward, device), term.weight) for term in stage.rewards]
    return Judges(trained, load_reward(stage.held_out, device, to_train_on=False))


def feedback_adapters(model: Teacher, lora: LoRA | None, stage: FeedbackConfig) -> AdaptedBackbone:
    """The feedback LoRA on the network into which ``lora`` is merged. None: on the network as it is."""
    if lora is not None:
        merge_lora(model.backbone.module, lora)  # with its adapter off, the network is then the distilled model, which the anchor needs
    hold_frozen(model.backbone, stage)
    adapters = AdaptedBackbone(
        model.backbone,
        model.process,
        rank=stage.lora.rank,
        target_modules=stage.lora.target_modules,
        names=(STUDENT,),
        trainable=(STUDENT,),
        seed=stage.loop.seed,
    )
    if stage.gradient_checkpointing:
        model.backbone.checkpoint_gradients()
    return adapters


def _annotated(source: AnnotatedData, stage: FeedbackConfig, model: Teacher, perceptual: PerceptualModel | None) -> AnnotatedSplit | None:
    if perceptual is None:
        return None
    return AnnotatedSplit(source.manifest, source.data, "train", model.resolution, perceptual.labels)


def guard_probe(model: Teacher, judges: Judges, evaluation: EvaluationConfig, stage: FeedbackConfig, latents: LatentCache) -> Probe:
    """The guard's prompts: of the validation split, where there is one. Never of the test split."""
    split = latents.split("val" if "val" in latents.splits else "train")
    rows = torch.arange(min(stage.guard.prompts, len(split)))
    features = load_features(evaluation.features, model.device)
    cond = split.conditioning(rows).to(model.device)
    return Probe(
        model, judges, features, split.captions(rows), cond, stage.sample.steps, stage.loop.seed, stage.guard.variants,
        evaluation.batch_size,
    )  # fmt: skip


def merge_feedback(lora: LoRA, feedback_lora: LoRA, stage: FeedbackConfig) -> dict[str, LoRA]:
    """``lora + w * feedback`` for each of ``merge_weights``, as LoRAs of their own, by name (``w_0.50``)."""
    return {f"w_{weight:.2f}": combine(lora, feedback_lora, weight) for weight in stage.merge_weights}
