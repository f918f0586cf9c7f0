"""What a comparison of runs found: verdicts against the first run, and what differed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from pydantic import Field, field_validator

from hypersd_pipeline.comparison.runs import TEACHER, ComparedRun, Model, Runs
from hypersd_pipeline.comparison.verdict import RESAMPLES, Verdict, judge
from hypersd_pipeline.config import Count, Seed, Strict
from hypersd_pipeline.errors import UserError

_LAST = ("unified", "k1", "k2", "k4", "k8")
"""What a run is compared by, where the user names no model: the last stage that all runs have."""


class CompareConfig(Strict):
    """What is compared.

    Attributes:
        runs: two to eight runs: an id or a name in MLflow, or a data folder. The others are compared with the first.
        model: by which model, such as ``k4``. Unless given, by the last stage that all runs have.
        resamples, seed: of the intervals.
        prompts: whose images the page shows.
    """

    runs: tuple[str, ...] = Field(max_length=8)
    model: str | None = None
    resamples: int = Field(default=RESAMPLES, ge=100, le=10**6)
    seed: Seed = 0
    prompts: Count = 8

    @field_validator("runs", mode="before")
    @classmethod
    def _as_text(cls, runs: Any) -> Any:
        """Names of runs that YAML takes for numbers are names."""
        return tuple(str(run) for run in runs) if isinstance(runs, list | tuple) else runs


@dataclass(frozen=True)
class Entry:
    """A run on the page: ``A``, ``B`` and so on, and the model that it is compared by."""

    letter: str
    run: ComparedRun
    model_name: str
    model: Model


@dataclass(frozen=True)
class Comparison:
    """Runs and what was found.

    Attributes:
        verdicts: letter -> against the first run. others: letter -> name of a model -> the same by another model.
        steps: the numbers of steps of the table. metrics: those of the table and the curves, the primary one first.
        differing: ``parameters``, ``data``, ``code`` -> name -> its value in each run, where they differ.
        teacher: of the first run, where it was measured.
    """

    entries: tuple[Entry, ...]
    verdicts: Mapping[str, Verdict]
    others: Mapping[str, Mapping[str, Verdict]]
    steps: tuple[int, ...]
    metrics: tuple[str, ...]
    differing: Mapping[str, Mapping[str, tuple[str, ...]]]
    teacher: Model | None

    def summary(self) -> str:
        """The verdicts in words, with the names of the runs."""
        lines = [f"{entry.letter} is {entry.run.name} ({entry.run.place}), model {entry.model_name}." for entry in self.entries]
        for verdict in self.verdicts.values():
            lines.append(verdict.sentence + (f" {verdict.unpaired}" if verdict.unpaired else ""))
        return "\n\n".join(lines)

    def numbers(self) -> dict[str, dict[str, float]]:
        """Each verdict's primary differences with their intervals: ``{"B_less_A": {"fd_..._recon/4_steps": ...}}``."""
        first = self.entries[0].letter
        return {
            f"{letter}_less_{first}": {
                f"{found.metric}/{found.steps}_steps{end}": value
                for found in verdict.of(verdict.primary)
                for end, value in (("", found.value), ("_low", found.low), ("_high", found.high))
            }
            for letter, verdict in self.verdicts.items()
        }


def compare_runs(config: CompareConfig, runs: Runs) -> Comparison:
    """Read the runs and compare each with the first.

    Raises:
        UserError: there are fewer than two runs, one of them is not there or has no scores, or they have no model in common.
    """
    if len(config.runs) < 2:
        raise UserError("compare.runs: name two runs at least, such as --params 'compare.runs=[first,second]'.")
    if len(set(config.runs)) < len(config.runs):
        raise UserError("compare.runs: a run stands there twice; give each by its id, which `kedro run` prints and MLflow shows.")
    found = [runs(name) for name in config.runs]
    names = [_model(config, run, found) for run in found]
    entries = tuple(Entry(letter, run, name, run.models[name]) for letter, run, name in zip(ascii_uppercase, found, names, strict=False))
    first, *rest = entries
    verdicts = {entry.letter: _judge(config, first, entry, first.model, entry.model) for entry in rest}
    others = {
        entry.letter: {
            name: _judge(config, first, entry, first.run.models[name], model, timed=False)
            for name, model in entry.run.models.items()
            if name in first.run.models and name not in (TEACHER, first.model_name, entry.model_name)
        }
        for entry in rest
    }
    primary = next(iter(verdicts.values())).primary
    metrics = [metric for rows in first.model.scores.values.values() for metric in rows]
    known = [m for m in dict.fromkeys([primary, *metrics]) if all(verdict.of(m) for verdict in verdicts.values())]
    return Comparison(
        entries=entries,
        verdicts=verdicts,
        others=others,
        steps=tuple(sorted({n for entry in entries for n in entry.model.scores.values})),
        metrics=tuple(known),
        differing={kind: _differing([getattr(run, kind) for run in found]) for kind in ("parameters", "data", "code")},
        teacher=first.run.models.get(TEACHER),
    )


def _model(config: CompareConfig, run: ComparedRun, found: Sequence[ComparedRun]) -> str:
    """The model that a run is compared by."""
    students = [name for name in run.models if name != TEACHER] or list(run.models)
    if config.model is not None:
        if config.model not in run.models:
            raise UserError(f"compare.model: {run.name} has no model '{config.model}'; choose one of {', '.join(run.models)}.")
        return config.model
    shared = [name for name in (*_LAST, *students) if all(name in other.models for other in found)]
    if shared:
        return shared[0]
    return next((name for name in _LAST if name in run.models), students[-1])


def _judge(config: CompareConfig, first: Entry, second: Entry, a: Model, b: Model, timed: bool = True) -> Verdict:
    return judge(
        a.scores,
        b.scores,
        (first.letter, second.letter),
        resamples=config.resamples,
        seed=config.seed,
        seconds=(first.run.train_seconds, second.run.train_seconds) if timed else (None, None),
    )


def _differing(values: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """Names whose values are not the same in all runs that know any."""
    known = [some for some in values if some]
    names = sorted({name for some in known for name in some})
    return {
        name: tuple(some.get(name, "–") if some else "not recorded" for some in values)
        for name in names
        if len({some.get(name, "–") for some in known}) > 1
    }
