"""The page of a comparison: one HTML file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from hypersd_pipeline.comparison.runs import TEACHER, Model
from hypersd_pipeline.comparison.table import Comparison, Entry
from hypersd_pipeline.comparison.verdict import Difference
from hypersd_pipeline.evaluation.results import lower_is_better, title
from hypersd_pipeline.evaluation.samples import steps_label
from hypersd_pipeline.metrics.frechet import mean_estimate

log = logging.getLogger(__name__)

_TEMPLATES = Path(__file__).parents[1] / "assets" / "compare"
_SIDE, _LARGEST = 256, 4_500_000
"""Pixels of an image on the page, and characters that all images may take."""
_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#eab308", "#ec4899", "#14b8a6", "#64748b")
"""Of the runs, in order. Readable on white and on black."""


def render(comparison: Comparison, prompts: int, resamples: int, seed: int) -> str:
    """The page as HTML. Everything that a user has named is escaped.

    Args:
        prompts: whose images are shown, at most. Fewer where the page would become larger than 5 MB. resamples, seed: of the intervals.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"title": title, "steps": steps_label, "number": number, "duration": duration, "difference": difference}
    images, shown = _images(comparison, prompts)
    return environment.get_template("page.html.j2").render(
        comparison=comparison,
        colours=dict(zip((entry.letter for entry in comparison.entries), _COLOURS * len(comparison.entries), strict=False)),
        curves=[(metric, _curve(comparison, metric, resamples, seed)) for metric in comparison.metrics],
        lower_is_better=lower_is_better,
        images=images,
        prompts=shown,
    )


# --- words -------------------------------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Four digits. A dash where it is not known."""
    return "–" if value is None else f"{value:.4g}"


def difference(found: Difference) -> str:
    """``-12.3 [-20.1, -4.5]``."""
    return f"{found.value:+.3g} [{found.low:+.3g}, {found.high:+.3g}]"


def duration(seconds: float | None) -> str:
    """``13 min 20 s``."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    return f"{minutes[0]} min {minutes[1]} s" if seconds < 3600 else f"{hours[0]} h {hours[1]} min"


# --- images ------------------------------------------------------------------------------------------------------------------------------


def _images(comparison: Comparison, prompts: int) -> tuple[dict[str, dict[int, list[str]]], list[str]]:
    """Letter -> number of steps -> an address ``data:`` for each prompt, and these prompts: the first ones that all runs share."""
    shared = _shared_prompts([entry.model for entry in comparison.entries])[:prompts]
    found = {
        entry.letter: {n: entry.model.images(n)[: len(shared)] for n in entry.model.scores.values if n in comparison.steps}
        for entry in comparison.entries
    }
    if teacher := comparison.teacher:
        most = max(teacher.scores.values)
        found[TEACHER] = {most: teacher.images(most)[: len(shared)]} if teacher.scores.prompts[: len(shared)] == shared else {}
    found = {letter: {n: images for n, images in by_steps.items() if images} for letter, by_steps in found.items()}
    shown = min((len(images) for by_steps in found.values() for images in by_steps.values()), default=0)
    addresses = {letter: {n: [_address(image) for image in images[:shown]] for n, images in some.items()} for letter, some in found.items()}
    sizes = [sum(len(images[i]) for some in addresses.values() for images in some.values()) for i in range(shown)]
    while shown and sum(sizes[:shown]) > _LARGEST:
        shown -= 1
    cut = {letter: {n: images[:shown] for n, images in some.items()} for letter, some in addresses.items() if some}
    return (cut, shared[:shown]) if shown else ({}, [])


def _shared_prompts(models: Sequence[Model]) -> list[str]:
    """The prompts that all models begin with."""
    found = []
    for prompts in zip(*(model.scores.prompts for model in models), strict=False):
        if len(set(prompts)) > 1:
            break
        found.append(prompts[0])
    return found


def _address(image: Image.Image) -> str:
    """Small images without loss, others as JPEG of 256 pixels."""
    content = io.BytesIO()
    if max(image.size) <= _SIDE // 2:
        image.save(content, "PNG", optimize=True)
        kind = "png"
    else:
        smaller = image.copy()
        smaller.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        smaller.save(content, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


# --- curves ------------------------------------------------------------------------------------------------------------------------------


def _curve(comparison: Comparison, metric: str, resamples: int, seed: int) -> str:
    """An SVG of a metric against the number of steps: a line for each run with its interval, dotted the teacher at its most steps."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": metric, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        for entry, colour in zip(comparison.entries, _COLOURS * len(comparison.entries), strict=False):
            _draw(axes, entry, metric, colour, resamples, seed)
        if teacher := comparison.teacher:
            most = max(teacher.scores.values)
            if metric in teacher.scores.values[most]:
                value = float(teacher.scores.values[most][metric].mean())
                axes.axhline(value, color="#888888", linewidth=1, linestyle=":", label=f"teacher, {steps_label(most)}")
        steps = list(comparison.steps)
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [str(n) for n in steps])
        axes.minorticks_off()
        axes.set_xlabel("steps")
        for part in (*axes.spines.values(),):
            part.set_color("#888888")
        axes.tick_params(colors="#888888")
        axes.xaxis.label.set_color("#888888")
        axes.grid(color="#888888", alpha=0.2)
        axes.legend(frameon=False, labelcolor="#888888")
        content = io.StringIO()
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = content.getvalue()
    return svg[svg.index("<svg") :]


def _draw(axes: Any, entry: Entry, metric: str, colour: str, resamples: int, seed: int) -> None:
    values: Mapping[int, Any] = {n: rows[metric] for n, rows in entry.model.scores.values.items() if metric in rows}
    if not values:
        return
    estimates = [mean_estimate(rows, resamples, seed) for rows in values.values()]
    means = [estimate.value for estimate in estimates]
    errors = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
    axes.errorbar(list(values), means, yerr=errors, fmt="o-", color=colour, linewidth=1.5, markersize=4, capsize=3, label=entry.letter)
