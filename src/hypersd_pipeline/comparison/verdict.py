"""Which of two models is better: differences over the same prompts with their intervals, and one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.results import lower_is_better, title
from hypersd_pipeline.evaluation.samples import steps_label
from hypersd_pipeline.evaluation.scores import PromptScores
from hypersd_pipeline.metrics.frechet import mean_estimate

_PREFERRED = ("_recon", "_real", "clip_score")
"""What a comparison stands on: the first of these that both models have."""
RESAMPLES = 2000
"""Of the bootstrap behind an interval, unless something else is asked for."""


@dataclass(frozen=True)
class Difference:
    """The second model less the first, of one metric at one number of steps.

    Attributes:
        first, second: the metric of each model. low, high: the 95 % interval of ``second - first`` over the prompts.
    """

    metric: str
    steps: int
    first: float
    second: float
    low: float
    high: float

    @property
    def value(self) -> float:
        """``second - first``."""
        return self.second - self.first

    @property
    def better(self) -> Literal["first", "second"] | None:
        """The better model. None where the interval holds 0."""
        if self.low <= 0 <= self.high:
            return None
        return "second" if (self.high < 0) == lower_is_better(self.metric) else "first"

    @property
    def gain(self) -> tuple[float, float, float]:
        """How much better the second model is, with the interval's ends, lowest first: positive is better, whatever the metric."""
        if lower_is_better(self.metric):
            return -self.value, -self.high, -self.low
        return self.value, self.low, self.high


@dataclass(frozen=True)
class Verdict:
    """What a comparison of two models says.

    Attributes:
        primary: the metric that decides.
        differences: of every metric and number of steps that both have.
        unpaired: why the prompts could not be paired. None where they are.
        sentence: the verdict in words.
    """

    primary: str
    differences: tuple[Difference, ...]
    unpaired: str | None
    sentence: str

    def of(self, metric: str) -> list[Difference]:
        """The differences of a metric, by number of steps."""
        return [difference for difference in self.differences if difference.metric == metric]

    def winner(self, names: tuple[str, str] = ("A", "B")) -> str:
        """The verdict in a few words, by the primary metric."""
        sides = {difference.better for difference in self.of(self.primary)} - {None}
        if len(sides) == 2:
            return "It depends on the number of steps"
        return f"{names['second' in sides]} is better" if sides else f"No difference between {names[0]} and {names[1]} can be told"

    def at(self, steps: int) -> Difference | None:
        """What the primary metric says at a number of steps."""
        return next((difference for difference in self.of(self.primary) if difference.steps == steps), None)


def paired_differences(
    champion: PromptScores, challenger: PromptScores, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Difference, ...]:
    """What a challenger gains over a champion on the same prompts from the same noise: every metric at every number of steps of both.

    The interval is that of a bootstrap over prompts. Prompts are drawn for both models together, so what makes a prompt hard for both
    does not widen it. It says what other prompts would change, and nothing of other training seeds.

    Args:
        champion, challenger: see `evaluation.scores.read_scores`. resamples, seed: of the bootstrap.

    Raises:
        UserError: they were measured by other judges, on other prompts, noise or reference images, or have nothing in common.
    """
    names = ("the champion", "the challenger")
    _check_judges(champion, challenger, names)
    if why := _why_unpaired(champion, challenger):
        raise UserError(
            f"{why.split(',')[0].removesuffix('.')}, so champion and challenger do not pair; evaluate both with one evaluation_reference."
        )
    return _differences(champion, challenger, names, paired=True, resamples=resamples, seed=seed)


def judge(
    first: PromptScores,
    second: PromptScores,
    names: tuple[str, str] = ("A", "B"),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    seconds: tuple[float | None, float | None] = (None, None),
) -> Verdict:
    """Compare two models: as `paired_differences` where both saw the same prompts and noise, else as two independent samples.

    Args:
        names: what the sentence calls them. seconds: how long each was trained.

    Raises:
        UserError: they were measured by other judges, or have nothing in common.
    """
    _check_judges(first, second, names)
    unpaired = _why_unpaired(first, second)
    differences = _differences(first, second, names, paired=unpaired is None, resamples=resamples, seed=seed)
    primary = _primary([difference.metric for difference in differences])
    return Verdict(primary, differences, unpaired, _sentence(primary, differences, names, seconds))


def _check_judges(first: PromptScores, second: PromptScores, names: tuple[str, str]) -> None:
    if first.identity.get("judges") != second.identity.get("judges"):
        raise UserError(
            f"{names[0]} and {names[1]} were measured by other judges, so their metrics do not compare; evaluate both with equal "
            "evaluation.features, evaluation.clip and evaluation.rewards."
        )


def _differences(
    first: PromptScores, second: PromptScores, names: tuple[str, str], *, paired: bool, resamples: int, seed: int
) -> tuple[Difference, ...]:
    steps = sorted(first.values.keys() & second.values.keys())
    if not steps:
        raise UserError(
            f"{names[0]} was measured at {_steps(sorted(first.values))} and {names[1]} at {_steps(sorted(second.values))}; evaluate both "
            "at a common number, evaluation.student_steps."
        )
    same_number = len(first.prompts) == len(second.prompts)
    found = tuple(
        _difference(metric, n, a, second.values[n][metric], paired=paired, resamples=resamples, seed=seed)
        for n in steps
        for metric, a in first.values[n].items()
        if metric in second.values[n] and (same_number or not lower_is_better(metric))
    )
    if not found:
        raise UserError(f"{names[0]} and {names[1]} have no metric in common; evaluate both with the same version and evaluation.samples.")
    return found


def _why_unpaired(first: PromptScores, second: PromptScores) -> str | None:
    if len(first.prompts) != len(second.prompts):
        return f"The numbers of prompts differ ({len(first.prompts)} and {len(second.prompts)}), so distances are left out."
    if first.prompts != second.prompts:
        return "The prompts differ, so the runs are compared as two independent samples."
    if first.identity.get("seed") != second.identity.get("seed"):
        return "The seeds of the noise differ, so the runs are compared as two independent samples."
    if first.identity.get("reference") != second.identity.get("reference"):
        return "The reference images differ, so the runs are compared as two independent samples."
    return None


def _difference(metric: str, steps: int, a: Tensor, b: Tensor, *, paired: bool, resamples: int, seed: int) -> Difference:
    if paired:
        estimate = mean_estimate(b - a, resamples, seed)
        return Difference(metric, steps, float(a.mean()), float(b.mean()), estimate.low, estimate.high)
    generator = torch.Generator().manual_seed(seed)
    moves = [rows[torch.randint(len(rows), (resamples, len(rows)), generator=generator)].mean(1) for rows in (a, b)]
    low, high = torch.quantile(moves[1] - moves[0], torch.tensor([0.025, 0.975], dtype=a.dtype)).tolist()
    return Difference(metric, steps, float(a.mean()), float(b.mean()), low, high)


def _primary(metrics: Sequence[str]) -> str:
    distances = [metric for metric in metrics if metric.startswith(("fd_", "fid_"))]
    found = (metric for wanted in _PREFERRED for metric in [*distances, *metrics] if metric.endswith(wanted))
    return next(found, metrics[0])


def _sentence(primary: str, differences: Iterable[Difference], names: tuple[str, str], seconds: tuple[float | None, float | None]) -> str:
    decisive = [difference for difference in differences if difference.metric == primary]
    word = "distance" if lower_is_better(primary) else title(primary)
    more = "lower" if lower_is_better(primary) else "higher"
    parts = []
    for side, name in zip(("second", "first"), reversed(names), strict=True):
        won = [difference for difference in decisive if difference.better == side]
        if won:
            by = [f"{_interval(difference, side)} at {steps_label(difference.steps)}" for difference in won]
            parts.append(f"{name} is better at {_steps([d.steps for d in won])}: its {word} is {more} by {_and(by)}")
    level = [difference.steps for difference in decisive if difference.better is None]
    if not parts:
        parts = [f"No difference between {names[0]} and {names[1]} can be told at {_steps(level)}"]
    elif level:
        parts.append(f"at {_steps(level)} no difference can be told")
    sentence = "; ".join(parts) + "."
    if against := _against(primary, decisive, differences, names):
        sentence += f" {against}"
    if all(seconds):
        sentence += f" {_times(seconds[1] / seconds[0], names)}"  # type: ignore[operator]
    return sentence


def _against(primary: str, decisive: Sequence[Difference], differences: Iterable[Difference], names: tuple[str, str]) -> str:
    """Which metrics say otherwise, and where."""
    winners = {difference.steps: difference.better for difference in decisive}
    found: dict[tuple[str, str], list[int]] = {}
    for difference in differences:
        winner = winners.get(difference.steps)
        related = difference.metric.removesuffix("_real") == primary.removesuffix("_recon")
        if difference.better and winner and difference.better != winner and not related:
            found.setdefault((difference.metric, difference.better), []).append(difference.steps)
    said = [f"the {title(metric)} prefers {names[side == 'second']} at {_steps(steps)}" for (metric, side), steps in found.items()]
    return f"But {_and(said)}." if said else ""


def _interval(difference: Difference, side: str) -> str:
    """How much, as a positive number, with its interval."""
    low, high = sorted((abs(difference.low), abs(difference.high)))
    return f"{abs(difference.value):.3g} [{low:.3g}, {high:.3g}]"


def _times(ratio: float, names: tuple[str, str]) -> str:
    if 0.95 < ratio < 1.05:
        return "Both were trained for about the same time."
    longer, factor = (names[1], ratio) if ratio > 1 else (names[0], 1 / ratio)
    return f"{longer} was trained {factor:.2g} times as long."


def _listed(steps: Iterable[int]) -> str:
    return _and([str(n) for n in sorted(steps)])


def _steps(steps: Sequence[int]) -> str:
    return "1 step" if list(steps) == [1] else f"{_listed(steps)} steps"


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
