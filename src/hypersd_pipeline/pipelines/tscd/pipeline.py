"""One stage pipeline, instantiated once for each number of segments."""

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.pipelines import evaluation
from hypersd_pipeline.pipelines.evaluation.nodes import evaluate_stage
from hypersd_pipeline.pipelines.tscd.nodes import train_stage

SEGMENTS = (8, 4, 2, 1)


def stage_pipeline(k: int, previous: int | None) -> Pipeline:
    """Train and evaluate the stage with `k` segments, starting from the LoRA of the stage with `previous` segments.

    Everything inside is in the namespace ``tscd_k<k>`` (``tscd_k8.metric_stream``, ``params:tscd_k8.stage``); the outputs are flat:
    ``lora_k8``, ``report_k8``, ``metrics_k8``, ``grid_k8``, ``samples_k8``.
    """
    start = {"previous": "previous"} if previous else {}
    carried = {"previous": f"lora_k{previous}"} if previous else {}
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
        namespace=f"tscd_k{k}",
        parameters={"params:teacher", "params:tscd", "params:evaluation"},
        inputs={"latents": "latents", "evaluation_reference": "evaluation_reference", **carried},
        outputs={name: f"{name}_k{k}" for name in ("lora", "report", "metrics", "grid", "samples")},
    )


def create_pipeline(**_: Any) -> Pipeline:
    """The reference that stages are evaluated against, and the four stages, from many segments to one."""
    reference = evaluation.create_pipeline().only_nodes("prepare_reference")
    return sum((stage_pipeline(k, previous) for previous, k in zip((None, *SEGMENTS[:-1]), SEGMENTS, strict=True)), reference)
