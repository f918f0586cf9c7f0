"""What feedback costs and brings: rewards, distance, diversity and mask AP with the feedback LoRA at several weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from hypersd_pipeline.evaluation.bench import Bench
from hypersd_pipeline.evaluation.plots import tradeoff_plot
from hypersd_pipeline.evaluation.probe import Judged, Probe
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.grids import labelled_grid
from hypersd_pipeline.metrics.mask_ap import mask_ap
from hypersd_pipeline.metrics.scorer import Scores
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.objectives import feedback as objective
from hypersd_pipeline.perception.annotations import AnnotatedSplit
from hypersd_pipeline.perception.protocol import PerceptualModel
from hypersd_pipeline.recipes.feedback import AnnotatedData, load_judges
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.config import FeedbackConfig
from hypersd_pipeline.training.processes import Place, on_processes


@on_processes
def measure_tradeoff(
    source: AnnotatedData,
    teacher: TeacherConfig,
    reference: Path,
    evaluation: EvaluationConfig,
    lora: LoRA,
    feedback_lora: LoRA,
    stage: FeedbackConfig,
    place: Place | None = None,
) -> tuple[pd.DataFrame, dict[str, Any], Image.Image, Image.Image]:
    """Rewards, distance, diversity, Frechet distance and mask AP with 0, and with each of ``merge_weights``, times the feedback LoRA.

    Returns:
        A line per weight. The same as metrics by weight, and those of the evaluation at weight 1 (or the last one below) as other models
        have them. The diversity of a line is that of `Probe`, of a quarter of the prompts. The plot of reward against distance, a point per
        weight. A grid, a column per weight.
    """
    contract = Contract.of(lora)
    bench = Bench.load(teacher, reference, evaluation, lora.metadata.get("data_rows"))
    judges = load_judges(stage, bench.teacher.device)
    segmenter = stage.segmenter
    perceptual = None if segmenter is None else segmenter.load(bench.teacher.device)
    split, steps = bench.splits["test"], stage.sample.steps
    probe = Probe(
        bench.teacher, judges, bench.scorer.features, split.prompts, bench.cond["test"], steps, evaluation.seed, stage.guard.variants,
        evaluation.batch_size,
    )  # fmt: skip
    merge_lora(bench.teacher.backbone.module, lora)
    shared = contract.only_timestep is None and probe.samples_as(
        contract.timesteps(steps, bench.teacher.process.num_train_timesteps).tolist(), contract.eta
    )  # the table's images are then the probe's
    lines, columns, before = [], [], 0.0
    headline: dict[str, float] = {}
    for weight in sorted({0.0, *stage.merge_weights}):
        merge_lora(bench.teacher.backbone.module, feedback_lora, weight - before)
        before = weight
        judged: list[Judged] = []
        row, shown = bench.row("test", steps, contract, look=partial(_judge, probe, judged) if shared else lambda *batch: None)
        if weight <= 1:
            headline = {**row, "samples": float(len(split))}
        line = {"weight": weight, **{name.split("/")[0]: v for name, v in row.items() if not name.endswith(("_low", "_high"))}}
        line |= probe.measure(bench.denoiser(), judged=judged if shared else None)
        if perceptual is not None:
            line |= noised_image_ap(source, bench, perceptual, stage)
        lines.append(line)
        columns.append((f"feedback x {weight:g}", shown))
    frame = pd.DataFrame(lines)
    metrics: dict[str, Any] = {f"w_{line['weight']:.2f}": {k: float(v) for k, v in line.items() if k != "weight"} for line in lines}
    return frame, {**headline, **metrics}, tradeoff_plot(frame), labelled_grid(columns, split.prompts[: evaluation.grid_prompts])


def _judge(probe: Probe, judged: list[Judged], prompts: Sequence[str], images: Tensor, scores: Scores) -> None:
    judged.append(probe.judge(prompts, images, scores.features))


@torch.no_grad()
def noised_image_ap(source: AnnotatedData, bench: Bench, perceptual: PerceptualModel, stage: FeedbackConfig) -> dict[str, float]:
    """Mask AP on test images that were noised as in the training and sampled again from there."""
    assert stage.segmenter is not None
    model, evaluation = bench.teacher, bench.config
    annotated = AnnotatedSplit(source.manifest, source.data, evaluation.split, model.resolution, perceptual.labels)
    rows = annotated.annotated()[: stage.test_images]
    split, denoiser = source.latents.split(evaluation.split), bench.denoiser()
    timesteps = model.process.trailing_timesteps(stage.sample.steps).tolist()[stage.segmenter.start(stage.sample.steps) :]
    noise = torch.randn(len(rows), *model.latent_shape, generator=torch.Generator().manual_seed(evaluation.seed))
    size, images = evaluation.batch_size, []
    for picks, z in distributed.mine(list(zip(rows.split(size), noise.split(size), strict=True))):
        at = torch.full((len(picks),), timesteps[0], device=model.device)
        cond = split.conditioning(picks).to(model.device)
        x = model.process.add_noise(split.sample(picks, None).to(model.device), z.to(model.device), at)
        images.append(model.decode(objective.advance(denoiser, x, [*timesteps, 0], cond)).cpu())
    return mask_ap(perceptual, torch.cat(distributed.gathered(images)), [annotated.instances(int(i)) for i in rows])
