"""The whole rehearsal, and its table."""

from __future__ import annotations

import logging

import pandas as pd

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.public import description
from hypersd_pipeline.recipes.plan.needs import form_of, needs_of
from hypersd_pipeline.recipes.rehearsal import run
from hypersd_pipeline.recipes.rehearsal.run import FAILED, GB, PASSED, UNITS, Outcome, Rehearsal, Unit
from hypersd_pipeline.recipes.rehearsal.world import BATCH, Environment, RehearsalConfig, World, make_world

log = logging.getLogger(__name__)


def rehearse(config: RehearsalConfig, environment: Environment) -> tuple[pd.DataFrame, str]:
    """Make the world, plan the trainings, run all units, and compare their memory with the plan.

    Returns:
        A line for each unit (``stage``, ``result``, ``seconds``, ``peak_gb``, ``plan_gb``, ``ratio``, ``note``), and the same for reading.
        ``plan_gb`` is the plan's peak, of a pass or of loading, and what a process takes that only imports.

    Raises:
        UserError: see `make_world`.
    """
    world = make_world(config, environment)
    units = [unit for unit in UNITS if config.only is None or unit.name.startswith(config.only)]
    planned = _planned(units, world)
    rehearsal = Rehearsal(world, planned)
    outcomes = rehearsal.run(units)
    if not config.keep and all(outcome.result != FAILED for outcome in outcomes):
        run.clear(world)
    table = pd.DataFrame([_line(outcome, planned.get(outcome.unit.name)) for outcome in outcomes])
    return table, _text(config, table)


def _planned(units: list[Unit], world: World) -> dict[str, float]:
    """Bytes that each training takes by the plan, with those of its libraries."""
    told, imports = description(world.teacher), run.baseline(world.folder)
    planned: dict[str, float] = {}
    known: dict[str, int] = {}
    for unit in units:
        key, _, node = unit.name.partition(".")
        if node == "train":
            stage = world.stages[key]
            form = form_of(key, stage)
            if form not in known:
                log.info("Plan of the rehearsal: %s", key)
                needs = needs_of(key, stage, world.teacher, told, judged=BATCH)
                known[form] = max(needs.peak, needs.loading)
            planned[unit.name] = imports + known[form]
    return planned


def _line(outcome: Outcome, planned: float | None) -> dict[str, object]:
    ran = outcome.seconds > 0
    return {
        "stage": outcome.unit.name,
        "result": outcome.result,
        "seconds": round(outcome.seconds, 1) if ran else None,
        "peak_gb": round(outcome.peak / GB, 2) if ran else None,
        "plan_gb": None if planned is None else round(planned / GB, 2),
        "ratio": round(planned / outcome.peak, 2) if ran and planned is not None else None,
        "note": outcome.note,
    }


def _text(config: RehearsalConfig, table: pd.DataFrame) -> str:
    lines = [f"# Rehearsal of {config.environment}", "", "| " + " | ".join(table.columns) + " |", "|" + "-|" * len(table.columns)]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join("" if value is None or value != value else str(value) for value in row) + " |")
    return "\n".join(lines) + "\n"


def require_passed(table: pd.DataFrame) -> None:
    """Raises UserError naming the first part that failed."""
    failed = table[table["result"] == FAILED]
    if len(failed):
        first, rest = failed.iloc[0], len(table[table["result"] != PASSED]) - 1
        more = f" ({rest} more did not pass)" if rest else ""
        raise UserError(f"rehearsal: {first['stage']} failed: {first['note']}{more}.")
