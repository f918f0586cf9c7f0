"""Guard against reward hacking: training ends when a reward that is never trained on falls while the trained ones rise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hypersd_pipeline.config import Count, Strict, Weight

log = logging.getLogger(__name__)

TRAINED, HELD_OUT, CHANGE = "trained_reward", "held_out_reward", "held_out_change"


class GuardConfig(Strict):
    """When to measure, and when to stop.

    Attributes:
        every: updates between two measurements.
        prompts: images that are sampled for a measurement. variants: images of a prompt that the diversity is taken of, at least 2.
        tolerance: by how much the held-out reward may lie below its start.
        interval: the held-out reward counts as fallen only where the 95 % interval of its mean change, prompt by prompt, lies below the
            tolerance as a whole. So the noise of few prompts does not end a training.
        patience: measurements in a row with the held-out reward below that and the trained rewards above their start, after which training
            ends.
    """

    every: Count
    prompts: int = Field(ge=2, le=10**6)
    variants: int = Field(default=3, ge=2, le=1000)
    tolerance: Weight = 0.0
    interval: bool = False
    patience: Count = 2

    later: ClassVar[frozenset[str]] = frozenset({"interval"})


class Guard:
    """Asked by the loop before each update. Its history and the last good weights are part of the checkpoint.

    Args:
        measure: samples and scores. Gives at least ``trained_reward`` (their mean) and ``held_out_reward``.
        parameters: what is trained. Brought back to the last good measurement when training is ended.
        metrics: where measurements are logged.
        last: the stage's last step, at which there is a measurement too.
        scores: the held-out reward of each prompt at the last measurement ``[n]``, for intervals.
    """

    def __init__(
        self,
        config: GuardConfig,
        measure: Callable[[], dict[str, float]],
        parameters: list[torch.nn.Parameter],
        metrics: Callable[[dict[str, float], int], None],
        last: int,
        scores: Callable[[], Tensor] | None = None,
    ) -> None:
        if config.interval and scores is None:
            raise ValueError("guard.interval needs the scores of each prompt")
        self.config, self.measure, self.parameters, self.metrics, self.last = config, measure, parameters, metrics, last
        self.scores, self.first_scores = scores if config.interval else None, torch.empty(0)
        self.history: list[dict[str, float]] = []
        self.good: list[Tensor] = [p.detach().clone() for p in parameters]

    def __call__(self, step: int) -> bool:
        """Whether training is to end here."""
        if self.hacked:
            return True
        if (step % self.config.every == 0 or step == self.last) and (not self.history or self.history[-1]["step"] < step):
            values = {**self.measure(), **self._change()}
            self.history.append({**values, "step": float(step)})
            self.metrics({f"guard/{name}": value for name, value in values.items()}, step)
            if not self._suspicious(self.history[-1]):
                self.good = [p.detach().clone() for p in self.parameters]
            if self.hacked:
                self._end(step)
        return self.hacked

    @property
    def hacked(self) -> bool:
        """Whether the last ``patience`` measurements were all suspicious."""
        last = self.history[-self.config.patience :]
        return len(last) == self.config.patience and all(self._suspicious(values) for values in last)

    def _change(self) -> dict[str, float]:
        """The interval of the held-out reward's mean change since the start, where it is asked for."""
        if self.scores is None:
            return {}
        scores = self.scores().double().cpu()
        if not len(self.first_scores):
            self.first_scores = scores
        change = scores - self.first_scores
        half = 1.96 * change.std() / len(change) ** 0.5
        return {f"{CHANGE}_low": float(change.mean() - half), f"{CHANGE}_high": float(change.mean() + half)}

    def _suspicious(self, values: Mapping[str, float]) -> bool:
        start = self.history[0]
        if self.config.interval:
            fallen = values[f"{CHANGE}_high"] < -self.config.tolerance
        else:
            fallen = values[HELD_OUT] < start[HELD_OUT] - self.config.tolerance
        return fallen and values[TRAINED] > start[TRAINED]

    def _end(self, step: int) -> None:
        for parameter, good in zip(self.parameters, self.good, strict=True):
            parameter.data.copy_(good)
        log.warning(
            "Step %d: the held-out reward has fallen from %.3f to %.3f while the trained ones rose from %.3f to %.3f: training ends, with "
            "the weights of the last good measurement. Lower the rewards' weights or raise the anchor's.",
            step, self.history[0][HELD_OUT], self.history[-1][HELD_OUT], self.history[0][TRAINED], self.history[-1][TRAINED],
        )  # fmt: skip

    def metrics_of_ends(self) -> dict[str, float]:
        """The first and the last measurement, and whether training was ended."""
        first = {f"before/{k}": v for k, v in self.history[0].items() if k != "step"}
        last = {f"after/{k}": v for k, v in self.history[-1].items() if k != "step"}
        return {**first, **last, "ended_by_guard": float(self.hacked)}

    def state_dict(self) -> dict[str, Any]:
        """History, last good weights and, for intervals, the scores of the start."""
        return {"history": self.history, "good": self.good, **({"first_scores": self.first_scores} if self.config.interval else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.history = [dict(values) for values in state_dict["history"]]
        self.first_scores = state_dict.get("first_scores", self.first_scores)
        self.good = [saved.to(p) for saved, p in zip(state_dict["good"], self.parameters, strict=True)]
