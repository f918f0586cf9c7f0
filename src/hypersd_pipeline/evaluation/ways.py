"""The unified LoRA on both grids of timesteps, over a range of eta: how much the way of sampling matters."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

import pandas as pd
from pydantic import Field

from hypersd_pipeline.config import Share, Steps, Strict
from hypersd_pipeline.evaluation.bench import Bench
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.contract import Contract, Grid
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.training.processes import Place, on_processes


class SamplingWaysConfig(Strict):
    """Attributes: ``grids``, ``etas`` (TCDScheduler's) and ``steps``, of which every combination is measured."""

    grids: tuple[Grid, ...] = Field(default=("tcd", "trailing"), min_length=1)
    etas: tuple[Share, ...] = Field(default=(0.0, 0.3, 1.0), min_length=1)
    steps: tuple[Steps, ...] = Field(default=(1, 2, 4, 8), min_length=1)


@on_processes
def measure_sampling(
    lora: LoRA,
    teacher: TeacherConfig,
    reference: Path,
    evaluation: EvaluationConfig,
    sampling: SamplingWaysConfig,
    place: Place | None = None,
) -> tuple[pd.DataFrame, str]:
    """Metrics of a LoRA for each grid, eta and number of steps. Where two ways are the same (one step), they are measured once.

    One step is taken from the grid's first point, T - 1. What it is with a contract that tells another timestep is in the evaluation.

    Returns:
        A line per way: steps, grid, eta and the metrics. The same as markdown.
    """
    bench = Bench.load(teacher, reference, evaluation, lora.metadata.get("data_rows"))
    merge_lora(bench.teacher.backbone.module, lora)
    known: dict[tuple[object, ...], Mapping[str, float]] = {}
    lines = []
    for steps, grid, eta in product(sampling.steps, sampling.grids, sampling.etas):
        contract = Contract(steps, eta, grid)
        timesteps = contract.timesteps(steps, bench.teacher.process.num_train_timesteps).tolist()
        way = (*timesteps, eta if steps > 1 else 0.0)  # the last step is never noised up again
        if way not in known:
            known[way] = bench.row("test", steps, contract)[0]
        own = {name.split("/")[0]: value for name, value in known[way].items() if not name.endswith(("_low", "_high"))}
        lines.append({"steps": steps, "grid": grid, "eta": eta, **own})
    frame = pd.DataFrame(lines)
    head = "|" + "|".join(frame.columns) + "|\n|" + "-|" * len(frame.columns)
    rows = ["|" + "|".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in line) + "|" for line in frame.itertuples(index=False)]
    return frame, "\n".join([head, *rows]) + "\n"
