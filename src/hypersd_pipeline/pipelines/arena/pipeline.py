"""Wiring of the arena."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.arena.serve import score_votes, serve

SHARED = {"arena": "params:arena", "teacher": "params:teacher", "evaluation": "params:evaluation", "loras": "loras", "votes": "votes"}


def create_pipeline(**_: Any) -> Pipeline:
    """``manifest`` and LoRAs -> the page, which closes with ``arena_session``. Votes -> ``arena_metrics`` and ``arena_table``.

    ``--tags score`` scores the votes without the page.
    """
    return Pipeline(
        [
            Node(serve, {**SHARED, "manifest": "manifest"}, "session", name="serve"),
            Node(score_votes, {**SHARED, "session": "session"}, ["metrics", "table"], name="score", tags="score"),
        ],
        namespace="arena",
        parameters={"params:arena", "params:teacher", "params:evaluation"},
        inputs={"manifest": "manifest", "loras": "arena_loras", "votes": "arena_votes"},
        outputs={"session": "arena_session", "metrics": "arena_metrics", "table": "arena_table"},
    )
