"""The table of results, from flat metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import pandas as pd

from hypersd_pipeline.metrics.config import EvaluationConfig

_KEY = re.compile(r"(?P<unseen>unseen_)?(?P<metric>\w+)/(?P<row>\d+_steps|real|recon)")
_TITLES = {
    "fd_efficientnet_lite0": "FD EfficientNet-Lite0",
    "fid_inception": "FID Inception-v3",
    "clip_score": "CLIP score",
    "image_quality": "image quality",
}


def long_table(models: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """One line per figure: model, row (``4_steps``, ``real``, ``recon``), split, metric, samples, value, low, high."""
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


def markdown(frame: pd.DataFrame, config: EvaluationConfig) -> str:
    """A table per split: rows are models and numbers of steps, figures have their 95 % interval in brackets."""
    parts = []
    for split, title in (("test", "Seen names, new combinations (`test`)"), ("test_unseen", "Names held out altogether (`test_unseen`)")):
        part = frame[frame.split == split]
        if len(part):
            how = (
                f"{part.samples.iloc[0]} prompts, seed {config.seed}, noise shared by all rows. The teacher is sampled with DDIM on "
                f"the trailing grid, guidance scale {config.guidance_scale:g}; each model as its card says, without guidance."
            )
            parts.append(f"## {title}\n\n{how}\n\n{_pivot(part)}\n")
    return "\n".join(parts)


def _pivot(part: pd.DataFrame) -> str:
    metrics = list(dict.fromkeys(part.metric))
    head = ["model", "steps", *(_title(m) for m in metrics)]
    lines = [head, ["-"] * len(head)]
    for (model, row), group in part.groupby(["model", "row"], sort=False):
        cells = {r.metric: f"{r.value:.4g} [{r.low:.4g}, {r.high:.4g}]" for r in group.itertuples()}
        label = {"real": ("real pictures", "-"), "recon": ("VAE reconstructions", "-")}.get(
            str(row), (model, str(row).removesuffix("_steps"))
        )
        lines.append([*label, *(cells.get(m, "") for m in metrics)])
    return "\n".join("|" + "|".join(map(str, line)) + "|" for line in lines)


def _title(metric: str) -> str:
    for suffix, words in (("_real", " to real"), ("_recon", " to reconstructions")):
        if metric.endswith(suffix):
            return _TITLES.get(metric.removesuffix(suffix), metric.removesuffix(suffix)) + words
    return _TITLES.get(metric, metric)
