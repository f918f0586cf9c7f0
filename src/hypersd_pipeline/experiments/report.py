"""Tables and the plot of an ablation or of replicates."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from PIL import Image

from hypersd_pipeline.experiments.power import comparisons, student_interval, two_digits

OURS = ("Hyper-SD", "8-4-2-1 hybrid", "unified")


def report(results: pd.DataFrame, compare: Mapping[str, str] | None = None) -> tuple[str, Image.Image]:
    """One table (markdown) and one plot.

    A cell's metric is the mean over its seeds. Its interval is Student's 95 % interval over them or, with one seed, the bootstrap interval
    over prompts. Tables: the Frechet distance to reconstructions, the CLIP score and the image quality at each number of steps. And, from
    two seeds on, by how much ours lie below each other candidate with the same seed, which what the seeds have in common does not blur.

    Args:
        compare: cell -> the cell that it is compared with, in a table of its own (`experiments.power`).
    """
    summary = summarise_seeds(results)
    distance = next(metric for metric in summary.metric.unique() if metric.endswith("_recon"))
    parts = [_table(summary, distance, "Frechet distance to the teacher's reconstructions (lower is better)")]
    parts += [_table(summary, metric, title) for metric, title in (("clip_score", "CLIP score"), ("image_quality", "Image quality"))]
    parts += [table for ours in OURS if (table := _paired(results, distance, ours))]
    parts += [comparisons(results, compare)] if compare else []
    return "\n\n".join(parts) + "\n", _plot(summary[summary.metric == distance])


def summarise_seeds(results: pd.DataFrame) -> pd.DataFrame:
    """A line per cell, number of steps and metric on the split ``test``: seeds, mean, low, high."""
    part = results[(results.split == "test") & results.row.str.endswith("_steps")]
    lines = []
    for (model, row, metric), group in part.groupby(["model", "row", "metric"], sort=False):
        n, (mean, half) = len(group), student_interval(group.value)
        low, high = (group.low.iloc[0], group.high.iloc[0]) if half is None else (mean - half, mean + half)
        steps = int(str(row).removesuffix("_steps"))
        lines.append({"model": model, "steps": steps, "metric": metric, "seeds": n, "mean": mean, "low": low, "high": high})
    return pd.DataFrame(lines)


def _table(summary: pd.DataFrame, metric: str, title: str) -> str:
    part = summary[summary.metric == metric]
    steps = sorted(part[part.model != "teacher"].steps.unique())
    lines = [["candidate", "seeds", *(f"{n} step{'s' if n > 1 else ''}" for n in steps)], ["-"] * (2 + len(steps))]
    best = part[part.model != "teacher"].groupby("steps")["mean"].agg("min" if metric.startswith(("fd_", "fid_")) else "max")
    for model, group in part.groupby("model", sort=False):
        cells = {r.steps: r for r in group.itertuples()}
        shown = [_cell(cells[n], model != "teacher" and cells[n].mean == best[n]) if n in cells else "" for n in steps]
        lines.append([str(model), str(group.seeds.max()), *shown])
    return f"### {title}\n\n" + "\n".join("|" + "|".join(line) + "|" for line in lines)


def _paired(results: pd.DataFrame, metric: str, ours: str) -> str | None:
    """Mean difference of ``ours`` to each candidate that has two seeds with it, seed by seed, with Student's 95 % interval."""
    part = results[(results.split == "test") & (results.metric == metric) & results.row.str.endswith("_steps")]
    table = part[part.model != "teacher"].pivot_table(index=["model", "seed"], columns="row", values="value")
    if ours not in table.index:
        return None
    mine = table.loc[ours].dropna(axis=1)
    rows = sorted(mine.columns, key=lambda row: int(str(row).removesuffix("_steps")))
    steps = [str(row).removesuffix("_steps") for row in rows]
    lines = []
    for other in (name for name in part.model.unique() if name not in (ours, "teacher")):
        differences = (mine - table.loc[other])[rows].dropna()
        if len(differences) > 1:
            cells = [f"{mean:+.3g} ± {two_digits(half)}" for mean, half in (student_interval(differences[row]) for row in rows)]
            lines.append([other, str(len(differences)), *cells])
    head = ["candidate", "seeds", *(f"{n} step{'s' if n != '1' else ''}" for n in steps)]
    shown = "\n".join("|" + "|".join(line) + "|" for line in [head, ["-"] * len(head), *lines])
    return f"### {ours} minus each candidate, Frechet distance (below zero: {ours} is better)\n\n{shown}" if lines else None


def _cell(row: object, best: bool) -> str:
    mean = f"**{row.mean:.4g}**" if best else f"{row.mean:.4g}"  # type: ignore[attr-defined]
    return f"{mean} [{row.low:.4g}, {row.high:.4g}]"  # type: ignore[attr-defined]


def _plot(part: pd.DataFrame) -> Image.Image:
    """A panel for each number of steps, a row for each candidate: the mean and its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    teacher = part[part.model == "teacher"].set_index("steps")["mean"]
    students = part[part.model != "teacher"]
    names, steps = list(students.model.unique()), sorted(students.steps.unique())
    figure = Figure(figsize=(3 + 2.3 * len(steps), 1.3 + 0.26 * len(names)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for panel, n in zip(panels, steps, strict=True):
        for row in students[students.steps == n].itertuples():
            error = np.array([[row.mean - row.low], [row.high - row.mean]]).clip(min=0)
            panel.errorbar(row.mean, names.index(row.model), xerr=error, fmt="o", markersize=4, capsize=2, color=_color(str(row.model)))
        low, high = panel.get_xlim()
        if len(teacher) and low < teacher[teacher.index.max()] < high:
            panel.axvline(teacher[teacher.index.max()], color="black", linewidth=1, linestyle=":")
        panel.set(title=f"{n} step{'s' if n > 1 else ''}", yticks=range(len(names)), yticklabels=names)
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    guided = f" (dotted: the teacher's {teacher.index.max()} steps)" if len(teacher) else ""
    figure.supxlabel(f"Frechet distance to reconstructions, lower is better{guided}", fontsize=10)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _color(model: str) -> str:
    """The method of this project, its last stage alone, and the others."""
    return "tab:blue" if model.startswith(("8-4-2-1", *OURS, "k8", "k4", "k2")) else "tab:purple" if model.startswith("k") else "tab:orange"


def feedback_table(tradeoff: pd.DataFrame) -> str:
    """Markdown: a line per metric, a column per weight, and how the last weight differs from 0 with the same seed.

    Means over the seeds and, from two seeds on, Student's 95 % intervals.
    """
    weights, metrics = sorted(tradeoff.weight.unique()), [name for name in tradeoff.columns if name not in ("model", "seed", "weight")]
    head = ["metric", *(f"feedback x {weight:g}" for weight in weights), f"x {weights[-1]:g} minus x {weights[0]:g}"]
    first, last = (tradeoff[tradeoff.weight == weight].set_index("seed") for weight in (weights[0], weights[-1]))
    lines = [head, ["-"] * len(head)]
    for name in metrics:
        cells = [student_interval(tradeoff[tradeoff.weight == weight][name]) for weight in weights]
        cells.append(student_interval(last[name] - first[name]))
        lines.append([name, *(f"{mean:.4g}" + ("" if half is None else f" ± {two_digits(half)}") for mean, half in cells)])
    return "\n".join("|" + "|".join(line) + "|" for line in lines) + "\n"
