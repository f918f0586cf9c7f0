"""What a run that finds checkpoints of another configuration does: continue them, start anew and say so, or ask first."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.training.checkpoints import CheckpointStore, Identity, Made

log = logging.getLogger(__name__)

FREE = ("loop.accumulate",)
"""Parts that may change: the batch of an update is the same, in other passes."""
GROWS = "loop.steps"
"""May grow: training goes on, and the schedule of the learning rate spans the new number of steps."""
RATES = ("loop.learning_rate", "loop.schedule", "loop.warmup_steps")
"""May change from here on, where ``loop.new_rate_from_here`` says so."""
ASK_ABOVE = 3600.0
"""Seconds of training that are not left behind without asking."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of everything that is not the same. What one side lacks is None there."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return {key: (before.get(key), after.get(key)) for key in sorted({*before, *after}) if before.get(key) != after.get(key)}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def continuation(store: CheckpointStore, identity: Identity, *, new_rate: bool) -> tuple[Made, dict[str, tuple[Any, Any]]] | None:
    """The training under another key that this one goes on from, and what is different. None where there is none.

    Args:
        new_rate: a changed learning rate holds from here on.
    """
    allowed = {GROWS, *FREE, *(RATES if new_rate else ())}
    steps = dict(_leaves(identity.parts)).get(GROWS)
    for made in store.others(identity.key):
        changes = differences(made.identity, identity.parts)
        if changes and set(changes) <= allowed and (steps is None or made.step <= steps):
            return made, changes
    return None


def check_restart(name: str, store: CheckpointStore, identity: Identity) -> None:
    """Say what is different from the longest training under another key, before a stage starts anew beside it.

    Raises:
        UserError: more than an hour of training would be left behind, and the store does not say that it is meant.
    """
    made = next(store.others(identity.key), None)
    if made is None:
        return
    changes = differences(made.identity, identity.parts)
    first = "; ".join(f"{key} was {_short(old)} and is {_short(new)}" for key, (old, new) in list(changes.items())[:3])
    more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
    told = f"{name}: {first or 'the checkpoints are of another version'}{more}, so that its checkpoint of step {made.step} does not fit"
    if made.seconds > ASK_ABOVE and not store.restart:
        raise UserError(
            f"{told}; {made.seconds / 3600:.1f} hours of training would be left behind. Set the old value to continue, or give --params "
            "restart=true to start anew."
        )
    log.warning("%s. The stage starts anew. The old checkpoints stay in %s.", told, store.path / made.key)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
