"""The order in which nodes run: one stage after the other, each with its evaluation."""

from __future__ import annotations

from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node


def by_stage(pipeline: Pipeline) -> list[Node]:
    """The nodes in an order in which a namespace that has begun goes on as soon as it can. Ties are in Kedro's own order.

    Kedro orders nodes by how many come before them. ``tscd_k4.train`` would come before ``tscd_k8.evaluate``.
    """
    before, waiting = pipeline.node_dependencies, list(pipeline.nodes)
    order: list[Node] = []
    begun: set[str] = set()
    while waiting:
        ready = (node for node in waiting if before[node] <= set(order))
        chosen = max(ready, key=lambda node: node.namespace in begun)
        waiting.remove(chosen)
        order.append(chosen)
        if chosen.namespace:
            begun.add(chosen.namespace)
    return order
