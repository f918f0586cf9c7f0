"""Wiring of the segmentation model's training."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.recipes.segmenter import evaluate_segmentation_model, train_segmentation_model


def create_pipeline(**kwargs: Any) -> Pipeline:
    """``manifest``, ``params:data``, ``params:segmentation_model`` -> ``segmentation_model`` (a folder), its report, metrics and grid."""
    config = "params:segmentation_model"
    return Pipeline(
        [
            Node(
                train_segmentation_model,
                ["manifest", "params:data", config, "segmentation_model.checkpoints", "segmentation_model.metric_stream"],
                ["segmentation_model", "segmentation_report"],
                name="train_segmentation_model",
            ),
            Node(
                evaluate_segmentation_model,
                ["segmentation_model", "manifest", "params:data", config],
                ["segmentation_metrics", "segmentation_grid"],
                name="evaluate_segmentation_model",
            ),
        ]
    )
