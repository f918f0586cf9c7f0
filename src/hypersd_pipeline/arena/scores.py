"""What votes say: win rates, and the scores of Bradley and Terry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hypersd_pipeline.arena.contenders import Contender
from hypersd_pipeline.arena.votes import Vote
from hypersd_pipeline.metrics.frechet import Estimate

Array = NDArray[np.float64]
POINTS = 400 / math.log(10)
"""Points of a score for each unit of log-odds: 400 points more are odds of ten to one, as in chess."""


@dataclass(frozen=True)
class Tally:
    """Votes by contender's number.

    Attributes:
        wins: ``[n, n]``, how often the row's contender was preferred to the column's. ties: ``[n, n]``, symmetric.
    """

    wins: Array
    ties: Array


def tally(votes: Sequence[Vote], keys: Sequence[str]) -> Tally:
    """Count votes. keys: the contenders', in order."""
    at = {key: i for i, key in enumerate(keys)}
    wins, ties = np.zeros((len(at), len(at))), np.zeros((len(at), len(at)))
    for vote in votes:
        left, right = at[vote.left_key], at[vote.right_key]
        if vote.choice == "neither":
            ties[left, right] += 1
            ties[right, left] += 1
        elif vote.choice == "left":
            wins[left, right] += 1
        else:
            wins[right, left] += 1
    return Tally(wins, ties)


def win_rate(won: float, lost: float) -> Estimate:
    """The share of decided votes that were won, with Wilson's 95 % interval. Raises ZeroDivisionError without a vote."""
    from scipy.stats import binomtest

    interval = binomtest(round(won), round(won + lost)).proportion_ci(method="wilson")
    return Estimate(won / (won + lost), float(interval.low), float(interval.high))


def bradley_terry(counted: Tally) -> list[Estimate]:
    """Scores ``s`` with ``P(i preferred to j) = 1 / (1 + 10^((s_j - s_i) / 400))``. Their mean is 1000.

    Ties are half a vote for each. Every pair has one tie besides, so that a contender that won or lost everything has a finite score. The
    95 % intervals are the maximum's curvature's (Fisher information) and take votes as independent.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    n = len(counted.wins)
    won = counted.wins + counted.ties / 2 + (1 - np.eye(n)) / 2
    pairs = won + won.T

    def loss(theta: Array) -> tuple[float, Array]:
        gap = theta[:, None] - theta[None, :]
        value = float((won * np.logaddexp(0, -gap)).sum())
        pull = won * expit(-gap)
        return value, pull.sum(axis=0) - pull.sum(axis=1)

    theta = minimize(loss, np.zeros(n), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    theta -= theta.mean()
    chance = expit(theta[:, None] - theta[None, :])
    between = pairs * chance * chance.T
    deviation = np.sqrt(np.diag(np.linalg.pinv(np.diag(between.sum(axis=1)) - between)))
    scores = [(1000 + POINTS * float(t), 1.96 * POINTS * float(d)) for t, d in zip(theta, deviation, strict=True)]
    return [Estimate(value, value - half, value + half) for value, half in scores]


def score(votes: Sequence[Vote], several: Sequence[Contender]) -> tuple[dict[str, float], str]:
    """Metrics of a study, and a table to read.

    Returns:
        ``votes`` and ``voters``. Where there are votes, ``ties`` (their share) and ``bradley_terry/<contender>``. Where some are decided,
        ``left`` (the share of them for the left image, 0.5 if the position had no influence) and ``win_rate/<contender>``. All but the
        first three have ``_low`` and ``_high``. The same as markdown, with each pair besides.
    """
    voters = len({vote.voter for vote in votes})
    if not votes:
        return {"votes": 0, "voters": 0}, "There are no votes yet on these models.\n"
    counted = tally(votes, [c.key for c in several])
    decided = [vote for vote in votes if vote.choice != "neither"]
    metrics: dict[str, float] = {"votes": len(votes), "voters": voters, "ties": 1 - len(decided) / len(votes)}
    left = sum(vote.choice == "left" for vote in decided)
    if decided:
        metrics |= win_rate(left, len(decided) - left).flat("left")
    won, lost = counted.wins.sum(axis=1), counted.wins.sum(axis=0)
    rates = [win_rate(w, n) if w + n else None for w, n in zip(won, lost, strict=True)]
    scores = bradley_terry(counted)
    for contender, rate, points in zip(several, rates, scores, strict=True):
        metrics |= rate.flat(f"win_rate/{contender.name}") if rate else {}
        metrics |= points.flat(f"bradley_terry/{contender.name}")
    return metrics, _table(metrics, several, counted, rates, scores)


def _table(
    metrics: dict[str, float], several: Sequence[Contender], counted: Tally, rates: list[Estimate | None], scores: list[Estimate]
) -> str:
    told = f"{metrics['votes']:.0f} votes of {metrics['voters']:.0f} voters. {metrics['ties']:.0%} found no difference."
    if "left" in metrics:
        told += f" {metrics['left']:.0%} of the others chose the left image ({metrics['left_low']:.0%} to {metrics['left_high']:.0%})."
    lines = [
        told,
        "",
        "Intervals are of 95 % and take votes as independent. With few voters the true ones are wider.",
        "",
        "| contender | decided votes | win rate | Bradley-Terry |",
        "|-|-|-|-|",
    ]
    for i in sorted(range(len(several)), key=lambda i: -scores[i].value):
        decided = counted.wins[i].sum() + counted.wins[:, i].sum()
        points = f"{scores[i].value:.0f} ({scores[i].low:.0f} to {scores[i].high:.0f})"
        lines.append(f"| {several[i].title} | {decided:.0f} | {_percent(rates[i])} | {points} |")
    lines += ["", "| pair | first preferred | second preferred | no difference | the first's win rate |", "|-|-|-|-|-|"]
    for i, j in combinations(range(len(several)), 2):
        won, lost, ties = counted.wins[i, j], counted.wins[j, i], counted.ties[i, j]
        if won + lost + ties:
            rate = _percent(win_rate(won, lost) if won + lost else None)
            lines.append(f"| {several[i].title} - {several[j].title} | {won:.0f} | {lost:.0f} | {ties:.0f} | {rate} |")
    return "\n".join(lines) + "\n"


def _percent(rate: Estimate | None) -> str:
    return "-" if rate is None else f"{rate.value:.0%} ({rate.low:.0%} to {rate.high:.0%})"
