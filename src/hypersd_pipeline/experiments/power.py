"""What seeds can show: paired differences between cells with their intervals, and the smallest effect that so many seeds would find."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

SHOWN = ("clip_score", "image_quality", "mask_ap", "held_out_reward", "trained_reward", "diversity")
"""Metrics of the comparisons besides the distance, where cells have them."""
SEEDS = (3, 5, 10)
"""For how many seeds the smallest effect is told."""


def student_interval(values: pd.Series) -> tuple[float, float | None]:
    """The mean, and half of Student's 95 % interval. None for one value."""
    n = len(values)
    return float(values.mean()), _quantile(0.975, n - 1) * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None


def two_digits(half: float | None) -> str:
    """Two digits, never with an exponent for the sizes that metrics have here."""
    return "?" if half is None else f"{half:.0f}" if half >= 100 else f"{half:.2g}"


def smallest_effect(deviation: float, seeds: int) -> float:
    """The mean difference that ``seeds`` paired seeds find four times in five, at a two-sided level of 5 %.

    ``(t_{.975, n-1} + t_{.8, n-1}) s / sqrt(n)``, with Student's quantiles: the usual approximation of a paired t test's power.

    Args:
        deviation: ``s``, of a seed's difference. seeds: ``n``, two at least.
    """
    return (_quantile(0.975, seeds - 1) + _quantile(0.8, seeds - 1)) * deviation / math.sqrt(seeds)


def deviation_of(half: float, seeds: int) -> float:
    """The deviation of a seed's difference, from half of Student's 95 % interval of the mean over ``seeds`` seeds."""
    return half * math.sqrt(seeds) / _quantile(0.975, seeds - 1)


def differences(results: pd.DataFrame, ours: str, other: str) -> pd.DataFrame:
    """A line per metric and row that both cells have with the same seeds: metric, row, seeds, mean, half, deviation.

    ``mean`` is ours less the other's, seed by seed. ``half`` is half of Student's 95 % interval, ``deviation`` that of a seed's difference.
    Both are None for one seed.
    """
    part = results[results.split == "test"]
    tables = [part[part.model == name].pivot_table(index="seed", columns=["metric", "row"], values="value") for name in (ours, other)]
    lines = []
    for metric, row in (column for column in tables[0].columns if column in tables[1].columns):
        values = (tables[0][metric, row] - tables[1][metric, row]).dropna()
        if len(values):
            mean, half = student_interval(values)
            deviation = float(values.std(ddof=1)) if len(values) > 1 else None
            lines.append({"metric": metric, "row": row, "seeds": len(values), "mean": mean, "half": half, "deviation": deviation})
    return pd.DataFrame(lines, columns=["metric", "row", "seeds", "mean", "half", "deviation"])


def comparisons(results: pd.DataFrame, compare: Mapping[str, str]) -> str:
    """Markdown: each cell less the one that it is compared with, and the smallest effect that 3, 5 and 10 seeds would find."""
    head = ["cell", "less", "metric", "at", "seeds", "difference", *(f"{n} seeds show" for n in SEEDS)]
    lines = [head, ["-"] * len(head)]
    for ours, other in compare.items():
        found = differences(results, ours, other)
        for line in found[[_shown(metric) for metric in found.metric]].sort_values(["metric", "row"]).itertuples():
            known = line.deviation is not None and not math.isnan(line.deviation)
            effects = [two_digits(smallest_effect(line.deviation, n)) if known else "?" for n in SEEDS]
            shown = f"{line.mean:+.3g} ± {two_digits(line.half if known else None)}"
            lines.append([ours, other, line.metric, str(line.row).replace("_", " "), str(line.seeds), shown, *effects])
    note = (
        "The last columns are the differences that so many seeds find four times in five, from how these seeds' differences vary. "
        "With two or three seeds that is a rough guess."
    )
    return "### Paired differences, and what seeds can show\n\n" + "\n".join("|" + "|".join(line) + "|" for line in lines) + f"\n\n{note}"


def _shown(metric: str) -> bool:
    return metric in SHOWN or (metric.endswith("_recon") and "crop" not in metric)


def _quantile(share: float, freedom: int) -> float:
    """Student's t for a number of degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf(share, freedom))
