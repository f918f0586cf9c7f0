"""A retraining from the data to the decision."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.evaluation.bench import prepare_reference
from hypersd_pipeline.evaluation.scores import write_scores
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.lora import LoRA, lora_key
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes.feedback import AnnotatedData
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.retraining.challenger import forget, train_challenger
from hypersd_pipeline.retraining.change import Change, DataState, change_of, read_state, state_of, write_state
from hypersd_pipeline.retraining.config import RetrainConfig
from hypersd_pipeline.retraining.gate import Check, Decision, judge_metrics, outcome_of
from hypersd_pipeline.retraining.measure import check_weights, judged_by, measure, sample_in_diffusers

log = logging.getLogger(__name__)

CHAMPION, CHALLENGER = "champion", "challenger"
LORA, DATA = "lora", "data"
"""Folders of a version."""


@dataclass(frozen=True)
class Version:
    """A version in the registry.

    Attributes:
        fetch: downloads one of the version's folders into a folder of this machine, and returns where it lies.
    """

    number: str
    fetch: Callable[[str, Path], Path]


class Models(Protocol):
    """The registry of one model. `io.registry.ModelRegistry` is one.

    Attributes:
        name: of the model. path: a folder of this machine for what is fetched and for what is to be registered.
    """

    name: str
    path: Path

    def version(self, alias: str) -> Version | None:
        """The version that has the alias, if there is one."""
        ...

    def write_lora(self, folder: Path, lora: LoRA) -> None:
        """Write a LoRA with its scheduler and its card."""
        ...

    def read_lora(self, folder: Path) -> LoRA:
        """Read what `write_lora` wrote."""
        ...

    def register(self, folder: Path, tags: Mapping[str, str], description: str) -> Version:
        """Upload a folder as a new version. It has no alias yet."""
        ...

    def promote(self, version: Version, instead_of: str | None) -> None:
        """Make a version the champion. Raises UserError if another than ``instead_of`` is the champion by now."""
        ...

    def set_alias(self, alias: str, version: Version) -> None:
        """Give an alias to a version."""
        ...


@dataclass(frozen=True)
class Watched:
    """The state of the data, and what changed since a version was judged last.

    Attributes:
        judged: that version.
    """

    state: DataState
    change: Change
    judged: str | None


def watch(manifest: Manifest, latents: LatentCache, models: Models, config: RetrainConfig) -> Watched:
    """Compare the data with those of the version that was judged last, whether or not it was promoted.

    Raises:
        UserError: what that version was trained on cannot be read.
    """
    last, state = models.version(CHALLENGER), state_of(manifest, latents)
    before = None if last is None or config.force else read_state(last.fetch(DATA, _fresh(models.path / "judged")))
    change = change_of(before, state, min_rows=config.min_rows, max_drift=config.max_drift)
    if config.force:
        change = Change(change.rows, reasons=("retrain.force asks for it.",))
    log.info("Data: %s %s", change.summary(), " ".join(change.reasons) or "There is nothing to retrain on.")
    return Watched(state, change, last.number if last else None)


@dataclass(frozen=True)
class Retraining:
    """All that a retraining reads."""

    source: AnnotatedData
    teacher: TeacherConfig
    evaluation: EvaluationConfig
    config: RetrainConfig
    models: Models
    outputs: Outputs

    def run(self, watched: Watched) -> Decision:
        """Train a challenger if the data changed, judge it, register it, and promote it if it passes.

        Raises:
            UserError: the challenger is unfit (a size, its contract, diffusers), the champion is another teacher's, or what a stage says.
        """
        champion = self.models.version(CHAMPION)
        number = champion.number if champion else None
        if not watched.change.reasons:
            reason = f"The data did not change enough since version {watched.judged} was judged: {watched.change.summary()}"
            return Decision("kept", [reason], self.models.name, champion=number, change=watched.change.numbers())
        before = None
        if champion is not None:
            before = self.models.read_lora(champion.fetch(LORA, _fresh(self.models.path / CHAMPION)))
            check_weights(before, self.teacher)
        lora = self._train(before)
        candidate = _fresh(self.models.path / CHALLENGER)
        self.models.write_lora(candidate / LORA, lora)
        checks = [*self._fitness(candidate / LORA), *self._metrics(before, lora, candidate)]
        outcome = outcome_of(checks)
        write_state(_made(candidate / DATA), watched.state)
        reasons = [*watched.change.reasons, *_reasons(checks, outcome, number)]
        tags = {"outcome": outcome, "weights": lora_key(lora) or "", "compared_with": number or "none"}
        version = self.models.register(candidate, tags, " ".join(reasons))
        if outcome == "promoted":
            self.models.promote(version, number)
        self.models.set_alias(CHALLENGER, version)  # last: a retraining that was stopped before is done again
        forget({**self.config.scratch, **self.config.champion}, self.outputs)
        decision = Decision(outcome, reasons, self.models.name, version.number, number, checks, watched.change.numbers())
        log.info("%s: %s.", self.models.name, decision.headline())
        return decision

    def _train(self, champion: LoRA | None) -> LoRA:
        start = champion if self.config.start == "champion" else None
        stages = self.config.scratch if start is None else self.config.champion
        log.info("The challenger starts from %s: %s", "the teacher" if start is None else "the champion", ", ".join(stages))
        return train_challenger(stages, start, self.source, self.teacher, self.evaluation, self.outputs, self.models.path)

    def _fitness(self, folder: Path) -> list[Check]:
        """What every model has to pass. Raises UserError for what it does not: then the training is at fault."""
        lora = self.models.read_lora(folder)  # as it will be read by others
        check_weights(lora, self.teacher)
        prompt = self.source.manifest.splits["test"][0].captions[0]
        sample_in_diffusers(folder, self.teacher, json.loads(lora.metadata["sampling_contract"]), prompt)
        return [
            Check("weights", True, "Sizes, values and sampling contract fit the teacher."),
            Check("diffusers", True, "diffusers samples an image with it."),
        ]

    def _metrics(self, champion: LoRA | None, challenger: LoRA, folder: Path) -> list[Check]:
        evaluation = judged_by(self.evaluation, self.config.judges)
        reference = _fresh(self.models.path / "reference")
        prepare_reference(self.source.manifest, self.teacher, evaluation)(reference)
        mine = measure(challenger, self.source, self.teacher, reference, evaluation, self.config.judges)
        write_scores(_made(folder / "scores"), mine.scores)
        if champion is None:
            return []
        theirs = measure(champion, self.source, self.teacher, reference, evaluation, self.config.judges)
        return judge_metrics(theirs, mine, self.config.gate)


def _reasons(checks: list[Check], outcome: str, champion: str | None) -> list[str]:
    if champion is None:
        return ["There was no champion, so there was nothing to compare with."]
    if outcome == "kept":
        return [check.text for check in checks if not check.passed]
    return [next(check.text for check in checks if check.champion is not None), "Nothing else is worse beyond its tolerance."]


def _fresh(folder: Path) -> Path:
    """An empty folder."""
    if folder.exists():
        shutil.rmtree(folder)
    return _made(folder)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
