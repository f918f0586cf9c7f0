"""One stage pipeline, instantiated once for each number of segments, and once for each baseline."""

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.pipelines import evaluation
from hypersd_pipeline.pipelines.evaluation.nodes import evaluate_stage
from hypersd_pipeline.pipelines.tscd.nodes import train_stage

SEGMENTS = (8, 4, 2, 1)


def stage_pipeline(namespace: str, name: str, previous: str | None = None) -> Pipeline:
    """Train and evaluate one stage, starting from the LoRA of the stage ``previous``.

    Everything inside is in the namespace (``tscd_k8.metric_stream``, ``params:tscd_k8.stage``); the outputs are flat:
    ``lora_<name>``, ``report_<name>``, ``metrics_<name>``, ``grid_<name>``, ``samples_<name>``.
    """
    start = {"previous": "previous"} if previous else {}
    carried = {"previous": f"lora_{previous}"} if previous else {}
    train = Node(
        train_stage,
        inputs={
            "latents": "latents",
            "teacher": "params:teacher",
            "defaults": "params:tscd",
            "stage": "params:stage",
            "checkpoints": "checkpoints",
            "metric_stream": "metric_stream",
            **start,
        },
        outputs=["lora", "report"],
        name="train",
    )
    evaluate = Node(
        evaluate_stage,
        inputs={"lora": "lora", "teacher": "params:teacher", "reference": "evaluation_reference", "evaluation": "params:evaluation"},
        outputs=["metrics", "grid", "samples"],
        name="evaluate",
    )
    return Pipeline(
        [train, evaluate],
        namespace=namespace,
        parameters={"params:teacher", "params:tscd", "params:evaluation"},
        inputs={"latents": "latents", "evaluation_reference": "evaluation_reference", **carried},
        outputs={kind: f"{kind}_{name}" for kind in ("lora", "report", "metrics", "grid", "samples")},
    )


def chain(namespaces: dict[str, str]) -> Pipeline:
    """The reference that stages are evaluated against, and stages that start from one another.

    Args:
        namespaces: each stage's namespace and name, in order.
    """
    reference = evaluation.create_pipeline().only_nodes("prepare_reference")
    previous = (None, *namespaces.values())
    return sum(
        (stage_pipeline(space, name, before) for (space, name), before in zip(namespaces.items(), previous, strict=False)), reference
    )


def create_pipeline(**_: Any) -> Pipeline:
    """The four stages, from many segments to one."""
    return chain({f"tscd_k{k}": f"k{k}" for k in SEGMENTS})
