"""Wiring of the comparison."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.comparison.page import render
from hypersd_pipeline.comparison.runs import Runs
from hypersd_pipeline.comparison.table import CompareConfig, compare_runs


def compare_node(config: CompareConfig, runs: Runs) -> tuple[str, str, dict[str, dict[str, float]]]:
    """The page as HTML, the verdict in words, and the primary differences as metrics. See `comparison.table.compare_runs`."""
    found = compare_runs(config, runs)
    return render(found, config.prompts, config.resamples, config.seed), found.summary(), found.numbers()


def create_pipeline(**_: Any) -> Pipeline:
    """``params:compare`` and the runs that it names -> ``comparison_page``, ``comparison_verdict``, ``comparison_metrics``."""
    outputs = ["comparison_page", "comparison_verdict", "comparison_metrics"]
    return Pipeline([Node(compare_node, ["params:compare", "finished_runs"], outputs, name="compare")])
