"""The compatibility report: adherence to conditions, metrics and images of a few-step LoRA on what others have made."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.reference import choose_rows, images_of
from hypersd_pipeline.evaluation.samples import steps_label
from hypersd_pipeline.metrics.clip_score import clip_scores
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.edges import Detector, condition_of, edge_f1, edges_of
from hypersd_pipeline.metrics.frechet import frechet_estimate, mean_estimate
from hypersd_pipeline.metrics.grids import labelled_grid, to_pil
from hypersd_pipeline.metrics.scorer import Scorer, Scores
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.controlnet import find_controlnet, load_controlnet
from hypersd_pipeline.models.lora import LoRA
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.recipes.compatibility.config import KEY, CompatibilityConfig, base_teacher, style_file
from hypersd_pipeline.recipes.compatibility.parts import BASE, CONTROLNET, STYLE, STYLE_WEIGHTS
from hypersd_pipeline.recipes.compatibility.sampling import Studio, Way
from hypersd_pipeline.recipes.teacher.build import read_captioned_images

log = logging.getLogger(__name__)

MAIN = "teacher's base"
"""What the rows without anything else are called."""


@dataclass
class _Report:
    """What all rows share, and the lines so far.

    Attributes:
        prompts, images: of the split test, ``n`` of them. wanted: detector -> thin edges of the images.
        style: features of real images in the other style, where there are any.
    """

    scorer: Scorer
    evaluation: EvaluationConfig
    tolerance: int
    prompts: list[str]
    images: Tensor
    texts: Tensor
    wanted: dict[Detector, list[Tensor]]
    style: Tensor | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def measure(
        self,
        about: dict[str, Any],
        batches: Iterable[Tensor],
        detectors: Sequence[Detector] = (),
        teacher: Tensor | None = None,
        style: bool = False,
    ) -> tuple[Tensor, list[Image.Image]]:
        """Score the images of one row and add its lines.

        Args:
            about: the columns that say which row it is. detectors: whose edges the samples are compared with.
            teacher: features of the same model's images at most steps. style: whether to compare with real images of the style.

        Returns:
            The features ``[n, d]``, and the images of the grid.
        """
        parts: list[Scores] = []
        shown: list[Image.Image] = []
        f1: dict[Detector, list[float]] = {detector: [] for detector in detectors}
        start = 0
        for batch in batches:
            parts.append(self.scorer.score(batch, self.prompts[start : start + len(batch)]))
            for detector, values in f1.items():
                wanted = self.wanted[detector][start : start + len(batch)]
                values += [edge_f1(edges_of(image, detector), edges, self.tolerance) for image, edges in zip(batch, wanted, strict=True)]
            shown += [to_pil(image) for image in batch[: max(0, self.evaluation.grid_prompts - start)]]
            start += len(batch)
        scores = Scores.cat(parts)
        options: dict[str, Any] = {"resamples": self.evaluation.bootstrap, "seed": self.evaluation.seed}
        found = {f"edge_f1_{detector}": mean_estimate(torch.tensor(values), **options) for detector, values in f1.items()}
        found["clip_score"] = mean_estimate(clip_scores(scores.embeddings, self.texts), **options)
        if self.evaluation.image_quality:
            found["image_quality"] = mean_estimate(scores.quality, **options)
        found |= {name: mean_estimate(values, **options) for name, values in scores.rewards.items()}
        if teacher is not None:
            found[f"{self.scorer.distance}_teacher"] = frechet_estimate(scores.features, teacher, paired=True, **options)
        if style and self.style is not None:
            found[f"{self.scorer.distance}_style"] = frechet_estimate(scores.features, self.style, **options)
        for metric, value in found.items():
            self.lines.append({**about, "metric": metric, "samples": start, "value": value.value, "low": value.low, "high": value.high})
        log.info("%s: %s", ", ".join(map(str, about.values())), ", ".join(f"{name} {value.value:.3g}" for name, value in found.items()))
        return scores.features, shown


Column = tuple[str, list[Image.Image]]


def measure_compatibility(
    lora: LoRA,
    teacher: TeacherConfig,
    manifest: Manifest,
    evaluation: EvaluationConfig,
    compatibility: CompatibilityConfig,
    parts: Path,
    scenes: Path,
) -> tuple[str, pd.DataFrame, dict[str, Any], Image.Image, Image.Image]:
    """Sample the LoRA with each ControlNet, on each base and with each style LoRA, and the same models without it at many steps.

    Args:
        parts, scenes: what `recipes.compatibility.parts` made.

    Returns:
        The report as markdown, a line for each row and metric, the values as nested metrics, and two grids: ControlNets, and the others.

    Raises:
        UserError: the data set has no test images, or a part does not fit the teacher.
    """
    Contract.of(lora)
    model = load_teacher(teacher)
    report = _begin(model, manifest, evaluation, compatibility, scenes)
    studio = Studio(model, lora, evaluation)
    detectors = list(report.wanted)
    _reconstructions(report, model, detectors)
    plain = _rows(report, studio, compatibility, "base", MAIN, 1.0, detectors=detectors, style=True)
    controls = _controlnets(report, studio, compatibility, parts, plain)
    others = _named(MAIN, plain)
    others += _bases(report, lora, teacher, compatibility, parts)
    others += _styles(report, lora, teacher, compatibility, parts)
    frame = pd.DataFrame(report.lines)
    shown = report.prompts[: evaluation.grid_prompts]
    return (
        markdown(frame, compatibility, evaluation, report),
        frame,
        nested(frame),
        labelled_grid(controls, shown),
        labelled_grid(others, shown),
    )


def _begin(model: Teacher, manifest: Manifest, evaluation: EvaluationConfig, compatibility: CompatibilityConfig, scenes: Path) -> _Report:
    split = manifest.splits.get("test", ())
    if len(split) < 4:
        raise UserError("manifest: the split 'test' has fewer than 4 good rows; add rows to it in data.source and run data_prep again.")
    rows = choose_rows(split, compatibility.prompts, evaluation.seed)
    images = images_of(manifest, rows, model.resolution)
    scorer = Scorer(evaluation, model.device)
    prompts = [row.captions[0] for row in rows]
    detectors = dict.fromkeys(entry.detector for entry in compatibility.active_controlnets().values())
    wanted = {detector: [edges_of(image, detector) for image in images] for detector in detectors}
    style = None
    if any(compatibility.in_style()):
        pixels, _ = read_captioned_images(scenes, "test")
        with torch.inference_mode():
            batches = (batch.permute(0, 3, 1, 2).float().to(scorer.device) / 255 for batch in pixels.split(evaluation.batch_size))
            style = torch.cat([scorer.features(batch).float().cpu() for batch in batches])
    return _Report(scorer, evaluation, compatibility.tolerance, prompts, images, scorer.text_embeddings(prompts), wanted, style)


@torch.no_grad()
def _reconstructions(report: _Report, model: Teacher, detectors: Sequence[Detector]) -> None:
    """The most that can be had: what is left of the edges once the VAE has seen an image."""
    batches = (model.decode(model.encode_images(batch * 2 - 1)[0]).cpu() for batch in report.images.split(report.evaluation.batch_size))
    about = {"group": "reference", "name": "VAE reconstructions", "weight": 1.0, "model": "-", "steps": 0}
    report.measure(about, batches, detectors, style=True)


def _rows(
    report: _Report,
    studio: Studio,
    compatibility: CompatibilityConfig,
    group: str,
    name: str,
    weight: float,
    *,
    detectors: Sequence[Detector] = (),
    style: bool = False,
    conditions: Tensor | None = None,
    **way: Any,
) -> list[Column]:
    """The model without the LoRA at most steps, and with it at each number. Returns the grid's columns."""
    columns: list[Column] = []
    teacher: Tensor | None = None
    for steps, few in ((compatibility.teacher_steps, False), *((n, True) for n in compatibility.steps)):
        about = {"group": group, "name": name, "weight": weight, "model": "unified" if few else "without", "steps": steps}
        batches = studio.sample(report.prompts, Way(steps, few, **way), conditions)
        features, shown = report.measure(about, batches, detectors, teacher, style)
        teacher = features if teacher is None else teacher
        columns.append((steps_label(steps) if few else f"no LoRA, {steps}", shown))
    return columns


def _named(name: str, columns: list[Column]) -> list[Column]:
    """The model's name over its first column, which is without the LoRA. A name over each would not fit."""
    return [(name, columns[0][1]), *columns[1:]]


def _controlnets(report: _Report, studio: Studio, compatibility: CompatibilityConfig, parts: Path, plain: list[Column]) -> list[Column]:
    columns: list[Column] = [(f"no condition, {steps_label(max(compatibility.steps))}", plain[-1][1])]
    for name, control in compatibility.active_controlnets().items():
        key = f"{KEY}.controlnets.{name}"
        folder = parts / CONTROLNET.format(name) if control.source is None else find_controlnet(control.source, key)
        network = load_controlnet(folder, studio.model.backbone, key)
        conditions = torch.stack([condition_of(edges, control.detector) for edges in report.wanted[control.detector]])
        columns.append((name, [to_pil(condition) for condition in conditions[: report.evaluation.grid_prompts]]))
        for scale in control.scales:
            options: dict[str, Any] = {"controlnet": network, "scale": scale, "conditions": conditions}
            found = _rows(report, studio, compatibility, "controlnet", name, scale, detectors=[control.detector], **options)
            if scale == max(control.scales):
                columns += found
    return columns


def _bases(report: _Report, lora: LoRA, teacher: TeacherConfig, compatibility: CompatibilityConfig, parts: Path) -> list[Column]:
    columns: list[Column] = []
    for name, base in compatibility.active_bases().items():
        trained = base.source is None
        where = str(parts / BASE.format(name)) if base.source is None else base.source
        studio = Studio(load_teacher(base_teacher(teacher, where, base.variant)), lora, report.evaluation)
        found = _rows(report, studio, compatibility, "base", name, 1.0, style=trained)
        columns += _named(f"base {name}", found)
    return columns


def _styles(report: _Report, lora: LoRA, teacher: TeacherConfig, compatibility: CompatibilityConfig, parts: Path) -> list[Column]:
    columns: list[Column] = []
    for name, style in compatibility.active_styles().items():
        key = f"{KEY}.styles.{name}"
        file = parts / STYLE.format(name) / STYLE_WEIGHTS if style.source is None else style_file(style.source, key)
        studio = Studio(load_teacher(teacher), lora, report.evaluation, style=file, key=key)
        for weight in style.weights:
            found = _rows(report, studio, compatibility, "style", name, weight, style=style.source is None, style_weight=weight)
            if weight == max(style.weights):
                columns += _named(f"style {name}", found)
    return columns


# --- what is written ---------------------------------------------------------------------------------------------------------------------


def nested(frame: pd.DataFrame) -> dict[str, Any]:
    """``{"controlnet_canny_1": {"unified_4_steps": {metric: value}}}``, as metrics are logged."""
    found: dict[str, Any] = {}
    for line in frame.itertuples():
        row = "recon" if line.group == "reference" else f"{line.model}_{line.steps}_steps"
        name = str(line.name).replace("teacher's base", "main").replace(" ", "_")
        found.setdefault(f"{line.group}_{name}_{line.weight:g}", {}).setdefault(row, {})[line.metric] = line.value
    return found


def markdown(frame: pd.DataFrame, compatibility: CompatibilityConfig, evaluation: EvaluationConfig, report: _Report) -> str:
    """A table for each group. Values have their 95 % interval in brackets."""
    head = (
        f"# Compatibility\n\n{len(report.prompts)} prompts of the split `test`, seed {evaluation.seed}. All rows have the same noise. "
        "'without' is the model without the few-step LoRA: DDIM, guidance scale "
        f"{evaluation.guidance_scale:g}. 'unified' is with it, as its contract says, without guidance. "
        f"An edge may be off by {compatibility.tolerance} pixel(s).\n"
    )
    titles = {"reference": "Reference", "base": "Base models, without conditions", "controlnet": "ControlNets", "style": "Style LoRAs"}
    tables = [f"## {title}\n\n{_table(frame[frame.group == group])}\n" for group, title in titles.items() if (frame.group == group).any()]
    return "\n".join([head, *tables])


def _table(part: pd.DataFrame) -> str:
    metrics = list(dict.fromkeys(part.metric))
    lines: list[list[Any]] = [["name", "weight", "model", "steps", *metrics], ["-"] * (len(metrics) + 4)]
    for keys, group in part.groupby(["name", "weight", "model", "steps"], sort=False):
        name, weight, model, steps = keys
        cells = {line.metric: f"{line.value:.3g} [{line.low:.3g}, {line.high:.3g}]" for line in group.itertuples()}
        lines.append([name, f"{weight:g}", model, steps or "-", *(cells.get(metric, "") for metric in metrics)])
    return "\n".join("|" + "|".join(map(str, line)) + "|" for line in lines)
