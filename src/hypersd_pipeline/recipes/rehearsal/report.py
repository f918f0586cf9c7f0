"""The whole rehearsal, and its table."""

from __future__ import annotations

import pandas as pd

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.recipes.rehearsal import run
from hypersd_pipeline.recipes.rehearsal.run import FAILED, GB, PASSED, Outcome, Rehearsal
from hypersd_pipeline.recipes.rehearsal.world import Environment, RehearsalConfig, make_world


def rehearse(config: RehearsalConfig, environment: Environment) -> tuple[pd.DataFrame, str]:
    """Make the world, run all units in it, and compare their memory with the plan.

    Returns:
        A line for each unit (``stage``, ``result``, ``seconds``, ``peak_gb``, ``plan_gb``, ``ratio``, ``note``), and the same for reading.

    Raises:
        UserError: see `make_world`.
    """
    world = make_world(config, environment)
    rehearsal = Rehearsal(world)
    outcomes = rehearsal.run()
    if not config.keep and all(outcome.result != FAILED for outcome in outcomes):
        run.clear(world)
    table = pd.DataFrame([_line(outcome) for outcome in outcomes])
    return table, _text(config, table)


def _line(outcome: Outcome) -> dict[str, object]:
    ran = outcome.seconds > 0
    return {
        "stage": outcome.unit.name,
        "result": outcome.result,
        "seconds": round(outcome.seconds, 1) if ran else None,
        "peak_gb": round(outcome.peak / GB, 2) if ran else None,
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
