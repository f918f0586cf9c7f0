"""The gate: whether a challenger takes the champion's place, with the reasons."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hypersd_pipeline.comparison.verdict import Difference, lower_is_better, paired_differences
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.results import title
from hypersd_pipeline.evaluation.scores import PromptScores
from hypersd_pipeline.retraining.config import GateConfig
from hypersd_pipeline.retraining.measure import Measured

Outcome = Literal["promoted", "kept", "failed"]
EXIT_CODES: dict[Outcome, int] = {"promoted": 0, "kept": 10, "failed": 1}
"""What ``kedro run --pipelines retrain`` ends with."""


@dataclass(frozen=True)
class Check:
    """A condition of the gate.

    Attributes:
        name: such as ``clip_score``. passed: whether it holds. text: why, in a sentence.
        champion, challenger, low, high: the metric of each, and the 95 % interval of how much better the challenger is. None: no metric.
    """

    name: str
    passed: bool
    text: str
    champion: float | None = None
    challenger: float | None = None
    low: float | None = None
    high: float | None = None

    def numbers(self) -> dict[str, Any]:
        """For a report, without what is None."""
        values = {name: value for name, value in asdict(self).items() if value is not None and name != "name"}
        return {**values, "passed": float(self.passed)}


def judge_metrics(champion: Measured, challenger: Measured, config: GateConfig) -> list[Check]:
    """Compare both on the same prompts and seeds, each at its own number of steps.

    The distance has to be better beyond its interval, or within the tolerance while the challenger is cheaper. Everything else must not
    be worse beyond a tolerance.

    Raises:
        UserError: they were not measured with the same prompts, noise and judges, or there is no distance among the metrics.
    """
    found = _differences(champion.scores, challenger.scores, config)
    distance = next((one for end in ("_recon", "_real") for one in found if _is_distance(one) and one.metric.endswith(end)), None)
    if distance is None:
        raise UserError("retrain: the evaluation measured no distance to the test images, so the gate has nothing to stand on.")
    others = [one for one in found if not _is_distance(one)] + list(_differences(champion.diversity, challenger.diversity, config))
    spread = {name: float(rows.std()) for some in (champion.scores, champion.diversity) for name, rows in _only(some).items()}
    checks = [_distance_check(distance, champion, challenger, config)]
    checks += [_score_check(one, config.scores * spread[one.metric]) for one in others]
    if "mask_ap" in champion.masks and "mask_ap" in challenger.masks:
        checks.append(_mask_check(champion.masks["mask_ap"], challenger.masks["mask_ap"], config))
    return checks


def is_cheaper(champion: Measured, challenger: Measured) -> bool:
    """Whether sampling takes fewer steps, or as many with fewer numbers in the LoRA."""
    return (challenger.steps, challenger.parameters) < (champion.steps, champion.parameters)


def _is_distance(difference: Difference) -> bool:
    return lower_is_better(difference.metric)


def _only(scores: PromptScores) -> dict[str, Any]:
    """The metrics at the only number of steps."""
    (metrics,) = scores.values.values()
    return dict(metrics)


def _differences(champion: PromptScores, challenger: PromptScores, config: GateConfig) -> tuple[Difference, ...]:
    """Each at its own number of steps: the champion's scores stand at the challenger's number."""
    (steps,) = challenger.values
    moved = PromptScores(champion.prompts, champion.identity, {steps: _only(champion)})
    return paired_differences(moved, challenger, resamples=config.resamples, seed=config.seed)


def _distance_check(one: Difference, champion: Measured, challenger: Measured, config: GateConfig) -> Check:
    gain, low, high = one.gain
    allowed = config.distance * one.first
    cheaper = is_cheaper(champion, challenger)
    cost = f"{_steps(challenger.steps)} and {challenger.parameters} numbers instead of {_steps(champion.steps)} and {champion.parameters}"
    told = f"{title(one.metric)}: {one.second:.4g} instead of {one.first:.4g}, better by {gain:.3g} [{low:.3g}, {high:.3g}]"
    if one.better == "second":
        passed, why = True, "The interval is above 0."
    elif low >= -allowed and cheaper:
        passed, why = True, f"It is within {allowed:.3g} and cheaper: {cost}."
    elif low >= -allowed:
        passed, why = False, f"It is within {allowed:.3g}, but not better beyond its interval and not cheaper: {cost}."
    else:
        passed, why = False, f"It may be worse by more than {allowed:.3g}."
    return Check(one.metric, passed, f"{told}. {why}", one.first, one.second, low, high)


def _score_check(one: Difference, allowed: float) -> Check:
    gain, low, high = one.gain
    passed = low >= -allowed
    told = f"{title(one.metric)}: {one.second:.4g} instead of {one.first:.4g}, better by {gain:.3g} [{low:.3g}, {high:.3g}]"
    why = f"It is not worse by more than {allowed:.3g}." if passed else f"It may be worse by more than {allowed:.3g}."
    return Check(one.metric, passed, f"{told}. {why}", one.first, one.second, low, high)


def _mask_check(champion: float, challenger: float, config: GateConfig) -> Check:
    passed = challenger >= champion - config.masks
    why = "not worse" if passed else "worse"
    return Check(
        "mask_ap",
        passed,
        f"Mask AP: {challenger:.4g} instead of {champion:.4g}, {why} by more than {config.masks:g}.",
        champion,
        challenger,
    )


def _steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"


@dataclass(frozen=True)
class Decision:
    """What a retraining ended with.

    Attributes:
        outcome: ``promoted`` or ``kept``. reasons: in words, in order. checks: of the gate.
        version: of the challenger in the registry. champion: that the challenger was compared with. None where there is none.
        change: of the data.
    """

    outcome: Outcome
    reasons: Sequence[str]
    model: str
    version: str | None = None
    champion: str | None = None
    checks: Sequence[Check] = ()
    change: dict[str, Any] | None = None

    def report(self) -> dict[str, Any]:
        """For machines."""
        return {
            "outcome": self.outcome,
            "exit_code": EXIT_CODES[self.outcome],
            "model": self.model,
            "version": self.version,
            "champion_before": self.champion,
            "reasons": list(self.reasons),
            "checks": {check.name: check.numbers() for check in self.checks},
            "data": self.change or {},
        }

    def markdown(self) -> str:
        """For readers."""
        lines = [f"# {self.model}: {self.headline()}", "", *(f"- {reason}" for reason in self.reasons)]
        if self.checks:
            lines += ["", "| check | passed | why |", "|-|-|-|", *self._rows()]
        return "\n".join(lines) + "\n"

    def headline(self) -> str:
        """The outcome in a few words."""
        if self.outcome == "promoted":
            return f"version {self.version} is the champion" + (f" instead of version {self.champion}" if self.champion else "")
        return f"version {self.champion} stays the champion" if self.champion else "there is no champion"

    def _rows(self) -> Iterator[str]:
        yield from (f"| {check.name} | {'yes' if check.passed else 'no'} | {check.text} |" for check in self.checks)


def outcome_of(checks: Iterable[Check]) -> Outcome:
    """``promoted`` where all of them passed."""
    return "promoted" if all(check.passed for check in checks) else "kept"
