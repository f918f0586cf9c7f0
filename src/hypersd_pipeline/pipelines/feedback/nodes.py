"""Nodes of feedback learning: train the LoRA, merge it at several weights, measure the trade-off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from hypersd_pipeline.data.cache import LatentCache, SplitCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.diffusion.grids import trailing_timesteps
from hypersd_pipeline.diffusion.schedule import add_noise
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.features import load_features
from hypersd_pipeline.metrics.grids import labelled_grid
from hypersd_pipeline.metrics.mask_ap import mask_ap
from hypersd_pipeline.models.adapters import AdaptedUNet, checkpoint_gradients
from hypersd_pipeline.models.lora import Contract, LoRA, combine, lora_key, merge_lora
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.objectives import feedback as objective
from hypersd_pipeline.perception.annotations import AnnotatedSplit
from hypersd_pipeline.perception.load import load_perceptual_model
from hypersd_pipeline.perception.protocol import PerceptualModel
from hypersd_pipeline.pipelines.evaluation.nodes import Bench, watched
from hypersd_pipeline.pipelines.evaluation.sampling import generate
from hypersd_pipeline.pipelines.feedback.config import FeedbackConfig
from hypersd_pipeline.pipelines.feedback.report import tradeoff_plot
from hypersd_pipeline.pipelines.feedback.studio import Judges, Studio
from hypersd_pipeline.training.checkpoints import CheckpointStore, content_hashes, fingerprint
from hypersd_pipeline.training.feedback import STUDENT, Annotated, FeedbackStep, RewardTerm
from hypersd_pipeline.training.guard import Guard
from hypersd_pipeline.training.loop import MetricStream, make_accelerator, train


def train_feedback(
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    teacher: TeacherConfig,
    evaluation: EvaluationConfig,
    lora: LoRA,
    stage: FeedbackConfig,
    checkpoints: CheckpointStore,
    metric_stream: MetricStream,
) -> tuple[LoRA, dict[str, float]]:
    """Train the feedback LoRA on the model that ``lora`` makes of the teacher; that LoRA stays as it is.

    Returns:
        The feedback LoRA alone, and the report: the loop's figures, the guard's first and last look (``before/...``, ``after/...``) and
        ``ended_by_guard``.

    Raises:
        UserError: weights of a reward or of the perceptual model are missing, or the data set has no instance masks.
    """
    accelerator = make_accelerator(stage.loop)
    device = accelerator.device
    judges = Judges.load(stage, device)
    perceptual = None if stage.perceptual is None else load_perceptual_model(stage.perceptual, device)
    model = load_teacher(teacher, parts=("unet", "vae"), device=device)
    latents.require_teacher(model)
    adapters = _adapters(model, lora, stage)
    source = _Source(manifest, data, latents, stage, model, perceptual)
    terms = [RewardTerm(reward, c.alpha, c.weight) for (reward, _), c in zip(judges.trained, stage.rewards, strict=True)]
    step = FeedbackStep(
        adapters, stage.judgement, model.schedule, model.prediction_type, lambda z: model.decode(z, clip=False), terms, perceptual
    )
    student = adapters.parameters(STUDENT)
    studio = _studio(model, judges, evaluation, stage, latents)
    look = lambda: studio.look(adapters.denoiser(STUDENT), adapters.denoiser(None))  # noqa: E731
    guard = Guard(stage.guard, look, student, metric_stream, last=stage.loop.steps)
    report = train(
        "feedback",
        parameters=student,
        loss_fn=source.fed_to(step),
        config=stage.loop,
        state={"adapters": adapters, "guard": guard},
        key=_key(stage, model, latents, lora),
        checkpoints=checkpoints,
        metrics=metric_stream,
        accelerator=accelerator,
        finished=guard,
    )
    metadata = {**lora.metadata, "method": "feedback learning (Hyper-SD, arXiv 2404.13686, section 3.2); add to the LoRA it was trained on"}
    return adapters.export(STUDENT, {**metadata, "trained_on": lora_key(lora) or ""}), {**report, **guard.figures()}


def _adapters(model: Teacher, lora: LoRA, stage: FeedbackConfig) -> AdaptedUNet:
    merge_lora(model.unet, lora)  # with its adapter off, the UNet is then the distilled model, which the anchor needs
    adapters = AdaptedUNet(
        model.unet,
        rank=stage.lora.rank,
        target_modules=stage.lora.target_modules,
        names=(STUDENT,),
        trainable=(STUDENT,),
        seed=stage.loop.seed,
    )
    if stage.gradient_checkpointing:
        checkpoint_gradients(model.unet)
    return adapters


def _key(stage: FeedbackConfig, model: Teacher, latents: LatentCache, lora: LoRA) -> str:
    own = {**stage.model_dump(mode="json", exclude={"merge_weights", "test_pictures"}), "loop": stage.loop.identity()}
    return fingerprint(own, content_hashes(stage.judge_files()), latents.key, model.content_hash("unet"), lora_key(lora))


class _Source:
    """Draws prompts with pure noise, and annotated pictures with their latents."""

    def __init__(
        self,
        manifest: Manifest,
        data: DataConfig,
        latents: LatentCache,
        stage: FeedbackConfig,
        model: Teacher,
        perceptual: PerceptualModel | None,
    ) -> None:
        self.split, self.stage, self.device = latents.split("train"), stage, model.device
        self.batch = stage.loop.batch_size // stage.loop.accumulate
        self.annotated: AnnotatedSplit | None = None
        if perceptual is not None and stage.judgement.perceptual_weight:
            self.annotated = AnnotatedSplit(manifest, data, "train", model.resolution, perceptual.labels)
            self.rows = self.annotated.annotated()

    def fed_to(self, step: FeedbackStep) -> Callable[[torch.Generator], tuple[Tensor, dict[str, Tensor]]]:
        """The loss as the loop calls it."""

        def loss_fn(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            picks = torch.randint(len(self.split), (self.batch,), generator=generator)
            noise = torch.randn(self.batch, *self.split.latent_shape, generator=generator).to(self.device)
            cond, prompts = self.split.conditioning(picks).to(self.device), self.split.captions(picks)
            return step(noise, cond, prompts, self._real(generator), generator)

        return loss_fn

    def _real(self, generator: torch.Generator) -> Annotated | None:
        if self.annotated is None:
            return None
        picks = self.rows[torch.randint(len(self.rows), (self.stage.perceptual_batch,), generator=generator)]
        clean = self.split.sample(picks, generator).to(self.device)
        return Annotated(clean, self.split.conditioning(picks).to(self.device), [self.annotated.instances(int(i)) for i in picks])


def _studio(model: Teacher, judges: Judges, evaluation: EvaluationConfig, stage: FeedbackConfig, latents: LatentCache) -> Studio:
    """The guard's prompts: of the validation split, where there is one; never of the test split."""
    split: SplitCache = latents.split("val" if "val" in latents.splits else "train")
    rows = torch.arange(min(stage.guard.prompts, len(split)))
    features = load_features(evaluation.features, model.device)
    cond = split.conditioning(rows).to(model.device)
    return Studio(
        model, judges, features, split.captions(rows), cond, stage.judgement.steps, stage.loop.seed, stage.guard.variants,
        evaluation.batch_size,
    )  # fmt: skip


def merge_feedback(lora: LoRA, feedback_lora: LoRA, stage: FeedbackConfig) -> dict[str, LoRA]:
    """``lora + w * feedback`` for each of ``merge_weights``, as LoRAs of their own, by name (``w_0.50``)."""
    return {f"w_{weight:.2f}": combine(lora, feedback_lora, weight) for weight in stage.merge_weights}


def measure_tradeoff(
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    teacher: TeacherConfig,
    reference: Path,
    evaluation: EvaluationConfig,
    lora: LoRA,
    feedback_lora: LoRA,
    stage: FeedbackConfig,
) -> tuple[pd.DataFrame, dict[str, Any], Image.Image, Image.Image]:
    """Rewards, distance, diversity, Frechet distance and mask AP with 0, and with each of ``merge_weights``, times the feedback LoRA.

    Returns:
        A line per weight; the same as metrics by weight, and those of the evaluation at weight 1 (or the last one below) as other models
        have them; the plot of reward against distance, a point per weight; a grid, a column per weight.
    """
    contract = Contract.of(lora)
    bench = Bench.load(teacher, reference, evaluation, lora.metadata.get("data_rows"))
    judges = Judges.load(stage, bench.teacher.device)
    perceptual = None if stage.perceptual is None else load_perceptual_model(stage.perceptual, bench.teacher.device)
    split, steps = bench.splits["test"], stage.judgement.steps
    studio = Studio(
        bench.teacher, judges, bench.scorer.features, split.prompts, bench.cond["test"], steps, evaluation.seed, stage.guard.variants,
        evaluation.batch_size,
    )  # fmt: skip
    timesteps = contract.timesteps(steps, bench.teacher.schedule.num_train_timesteps)
    merge_lora(bench.teacher.unet, lora)
    lines, columns, before = [], [], 0.0
    headline: dict[str, float] = {}
    for weight in sorted({0.0, *stage.merge_weights}):
        merge_lora(bench.teacher.unet, feedback_lora, weight - before)
        before = weight
        options: dict[str, Any] = {"seed": evaluation.seed, "batch_size": evaluation.batch_size, "eta": contract.eta}
        shown: list[Image.Image] = []
        batches = watched(generate(bench.teacher, bench.cond["test"], timesteps, **options), shown, evaluation.grid_prompts)
        figures = bench.figures("test", f"{steps}_steps", bench.scorer.score_all(batches))
        if weight <= 1:
            headline = {**figures, "samples": float(len(split))}
        line = {"weight": weight, **{name.split("/")[0]: v for name, v in figures.items() if not name.endswith(("_low", "_high"))}}
        line |= studio.look(bench.teacher.denoiser())
        if perceptual is not None:
            line |= _noised_real_ap(manifest, data, latents, bench.teacher, perceptual, stage, evaluation)
        lines.append(line)
        columns.append((f"feedback x {weight:g}", shown))
    frame = pd.DataFrame(lines)
    metrics: dict[str, Any] = {f"w_{line['weight']:.2f}": {k: float(v) for k, v in line.items() if k != "weight"} for line in lines}
    return frame, {**headline, **metrics}, tradeoff_plot(frame), labelled_grid(columns, split.prompts[: evaluation.grid_prompts])


@torch.no_grad()
def _noised_real_ap(
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    model: Teacher,
    perceptual: PerceptualModel,
    stage: FeedbackConfig,
    evaluation: EvaluationConfig,
) -> dict[str, float]:
    """Mask AP on test pictures that were noised as in the training and drawn again from there."""
    annotated = AnnotatedSplit(manifest, data, "test", model.resolution, perceptual.labels)
    rows = annotated.annotated()[: stage.test_pictures]
    split, grid = latents.split("test"), trailing_timesteps(stage.judgement.steps, model.schedule.num_train_timesteps).tolist()
    start = grid[stage.judgement.noised_at :]
    generator, images = torch.Generator().manual_seed(evaluation.seed), []
    for picks in rows.split(evaluation.batch_size):
        clean = split.sample(picks, None)
        z = torch.randn(clean.shape, generator=generator).to(model.device)
        at = torch.full((len(picks),), start[0], device=model.device)
        cond = split.conditioning(picks).to(model.device)
        x = add_noise(clean.to(model.device), z, at, model.schedule)
        drawn = objective.advance(model.denoiser(), x, [*start, 0], cond, model.schedule, model.prediction_type)
        images.append(model.decode(drawn).cpu())
    return mask_ap(perceptual, torch.cat(images), [annotated.instances(int(i)) for i in rows])
