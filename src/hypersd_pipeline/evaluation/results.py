"""The table of results of all models, from flat metrics, and the main grid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from hypersd_pipeline.evaluation.reference import read_reference
from hypersd_pipeline.evaluation.samples import read_samples, steps_label
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.grids import labelled_grid

_KEY = re.compile(r"(?P<unseen>unseen_)?(?P<metric>\w+)/(?P<row>\d+_steps|real|recon)")
_TITLES = {
    "fd_efficientnet_lite0": "FD EfficientNet-Lite0",
    "fid_inception": "FID Inception-v3",
    "clip_score": "CLIP score",
    "image_quality": "image quality",
    "laion_aesthetic": "LAION aesthetic",
    "image_reward": "ImageReward",
    "pick_score": "PickScore",
    "hps_v2": "HPS v2",
    "diversity": "diversity",
    "teacher_distance": "distance to the teacher's samples",
}
_COLUMNS = {
    "clip_score": "clip",
    "image_quality": "quality",
    "laion_aesthetic": "laion",
    "image_reward": "reward",
    "pick_score": "pick",
    "hps_v2": "hps",
    "diversity": "diversity",
}
"""Metrics of the narrow table, and their columns."""
_SHORT = ("diversity", "teacher_distance")
"""Metrics that the table shows without their interval, so that it does not get too wide."""


MODELS = {"k8": (8,), "k4": (4,), "k2": (2,), "k1": (1,), "feedback": (4,), "unified": (1, 2, 4, 8), "unet": (1,)}
"""The chain's models, in order, and the numbers of steps that are shown of each."""


def long_table(models: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """One line per metric: model, row (``4_steps``, ``real``, ``recon``), split, metric, samples, value, low, high."""
    lines = []
    for model, metrics in models.items():
        for key, value in metrics.items():
            if match := _KEY.fullmatch(key):
                unseen = bool(match["unseen"])
                lines.append(
                    {
                        "model": model, "row": match["row"], "split": "test_unseen" if unseen else "test", "metric": match["metric"],
                        "samples": int(metrics["unseen_samples" if unseen else "samples"]),
                        "value": value, "low": metrics[f"{key}_low"], "high": metrics[f"{key}_high"],
                    }
                )  # fmt: skip
    return pd.DataFrame(lines)


def headline(frame: pd.DataFrame, rows: Iterable[tuple[str, int]]) -> dict[str, dict[str, float]]:
    """``{"k4_4_steps": {metric: value}}`` on the test split, for the (model, steps) pairs that were evaluated."""
    picked = {}
    for model, steps in rows:
        part = frame[(frame.model == model) & (frame.row == f"{steps}_steps") & (frame.split == "test")]
        if len(part):
            picked[f"{model}_{steps}_steps"] = dict(zip(part.metric, part.value.astype(float), strict=True))
    return picked


def short_table(picked: Mapping[str, Mapping[str, float]], seconds: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """A line for each model and number of steps, narrow enough for a terminal: ``{"unified_4": {"fd": 1049.0, ...}}``.

    Args:
        picked: see `headline`. The first row is the teacher at most steps, which ``ratio`` compares the distances with.
        seconds: how long each model was trained.

    Returns:
        ``fd`` (distance to reconstructions, lower is better), ``ratio``, the mean scores (higher is better), ``diversity`` and ``seconds``,
        with four digits. What was not measured is left out.
    """
    table: dict[str, dict[str, float]] = {}
    teacher: float | None = None
    for row, values in picked.items():
        name = row.removesuffix("_steps")
        distance = next((value for metric, value in values.items() if metric.endswith("_recon") and "_crop_" not in metric), None)
        line = {} if distance is None else {"fd": distance}
        teacher = teacher or distance
        if distance is not None and teacher:
            line["ratio"] = distance / teacher
        line |= {column: values[metric] for metric, column in _COLUMNS.items() if metric in values}
        model = name.rpartition("_")[0]
        line |= {"seconds": seconds[model]} if model in seconds else {}
        table[name] = {column: float(f"{value:.4g}") for column, value in line.items()}
    return table


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a distance between sets of images, whose size depends on how many there are."""
    return metric.startswith(("fd_", "fid_", "frechet_")) or "distance" in metric


def at_a_glance(model: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The one or two metrics by which runs are compared at a glance, with their direction: ``lower is better/k4 4 steps fd_..._recon``.

    Args:
        model: ``teacher``, or one of `MODELS`. metrics: its evaluation's. Returns nothing for another model.
    """
    measured = [int(match[1]) for match in (re.fullmatch(r"clip_score/(\d+)_steps", name) for name in metrics) if match]
    steps = {**MODELS, "unified": (1, 4), "teacher": (max(measured, default=0),)}.get(model, ())
    found = {}
    for n in steps:
        distance = next((name for name in metrics if name.endswith(f"_recon/{n}_steps") and not name.startswith("unseen_")), None)
        shown = [distance, f"clip_score/{n}_steps" if (model, n) == ("unified", 4) else None]
        for name in (name for name in shown if name in metrics and name is not None):
            direction = "lower" if lower_is_better(name) else "higher"
            found[f"{direction} is better/{model} {steps_label(n)} {name.partition('/')[0]}"] = float(metrics[name])
    return found


def last_words(picked: Mapping[str, Mapping[str, float]]) -> str | None:
    """One sentence that compares a run's models in three numbers: the teacher at most steps, the last stage at many and at one.

    Args:
        picked: see `headline`. Returns None where there is nothing to compare.
    """
    rows = {name: next((v for metric, v in values.items() if metric.endswith("_recon")), None) for name, values in picked.items()}
    by_model: dict[str, dict[int, str]] = {}
    for name in rows:
        model, _, steps = name.removesuffix("_steps").rpartition("_")
        by_model.setdefault(model, {})[int(steps)] = name
    teacher = by_model.get("teacher")
    last = next((by_model[model] for model in ("unified", "k1", "k2", "k4", "k8") if model in by_model), None)
    if teacher is None or last is None:
        return None
    shown = list(dict.fromkeys([teacher[max(teacher)], last[min(last, key=lambda steps: abs(steps - 4))], last[min(last)]]))
    numbers = [f"{name.removesuffix('_steps').replace('_', ' at ')} steps {rows[name]:.0f}" for name in shown]
    return f"Distance to reconstructions, lower is better: {', '.join(numbers)}.".replace(" at 1 steps", " at 1 step")


def markdown(frame: pd.DataFrame, config: EvaluationConfig) -> str:
    """A table per split: rows are models and numbers of steps, metrics have their 95 % interval in brackets."""
    parts = []
    for split, title in (("test", "Seen names, new combinations (`test`)"), ("test_unseen", "Names held out altogether (`test_unseen`)")):
        part = frame[frame.split == split]
        if len(part):
            how = (
                f"{part.samples.iloc[0]} prompts, seed {config.seed}, noise shared by all rows. The teacher is sampled with DDIM on "
                f"the trailing grid, guidance scale {config.guidance_scale:g}; each model as its card says, without guidance."
            )
            on_crops = part.metric.str.contains("_crop_")
            parts.append(f"## {title}\n\n{how}\n\n{_pivot(part[~on_crops])}\n")
            if on_crops.any():
                parts.append(f"### Details: the middle of each image at its own resolution\n\n{_pivot(part[on_crops])}\n")
    return "\n".join(parts)


def _pivot(part: pd.DataFrame) -> str:
    """Rows are models and numbers of steps, columns are metrics, the short ones last."""
    metrics = sorted(dict.fromkeys(part.metric), key=lambda metric: metric in _SHORT)
    head = ["model", "steps", *(title(m) for m in metrics)]
    lines = [head, ["-"] * len(head)]
    for (model, row), group in part.groupby(["model", "row"], sort=False):
        cells = {
            r.metric: f"{r.value:.3f}" if r.metric in _SHORT else f"{r.value:.4g} [{r.low:.4g}, {r.high:.4g}]" for r in group.itertuples()
        }
        label = {"real": ("real images", "-"), "recon": ("VAE reconstructions", "-")}.get(
            str(row), (model, str(row).removesuffix("_steps"))
        )
        lines.append([*label, *(cells.get(m, "") for m in metrics)])
    return "\n".join("|" + "|".join(map(str, line)) + "|" for line in lines)


def title(metric: str) -> str:
    """A metric's name for readers."""
    for suffix, words in (("_real", " to real"), ("_recon", " to reconstructions")):
        if metric.endswith(suffix):
            name, crop = metric.removesuffix(suffix), " on crops" if metric.endswith(f"_crop{suffix}") else ""
            return _TITLES.get(name.removesuffix("_crop"), name) + crop + words
    return _TITLES.get(metric, metric)


def summarise_models(
    reference: Path, teacher_metrics: Mapping[str, float], teacher_samples: Path, evaluation: EvaluationConfig, **stages: Any
) -> tuple[str, pd.DataFrame, dict[str, dict[str, float]], dict[str, dict[str, float]], Image.Image]:
    """One table of all models and numbers of steps, and the main grid.

    Args:
        stages: ``metrics_<model>``, ``report_<model>`` and, but for feedback, ``samples_<model>`` of the models in `MODELS`.

    Returns:
        The table as markdown, as data frame (a line per metric), the headline metrics by row, the narrow table (see `short_table`), and the
        grid: teacher at most and at 4 steps, then each model at its own.
    """
    names = [name for name in MODELS if f"metrics_{name}" in stages]
    frame = long_table({"teacher": teacher_metrics, **{name: stages[f"metrics_{name}"] for name in names}})
    most = max(evaluation.teacher_steps)
    own = [(name, n) for name in names for n in MODELS[name]]
    columns = [(f"teacher, {steps_label(n)}", read_samples(teacher_samples, n)) for n in dict.fromkeys((most, 4))]
    columns += [(f"{name}, {steps_label(n)}", read_samples(stages[f"samples_{name}"], n)) for name, n in own if f"samples_{name}" in stages]
    prompts = read_reference(reference)["test"].prompts[: evaluation.grid_prompts]
    picked = headline(frame, [("teacher", most), ("teacher", 4), *own])
    seconds = {name: stages[f"report_{name}"]["train_seconds"] for name in names if "train_seconds" in stages.get(f"report_{name}", {})}
    grid = labelled_grid([c for c in columns if c[1]], prompts)
    return markdown(frame, evaluation), frame, picked, short_table(picked, seconds), grid
