"""Wiring of the scheduled retraining."""

from __future__ import annotations

from typing import Any

from kedro.pipeline import Node, Pipeline

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.io.registry import ModelRegistry
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.nodes import HANDLES, data_nodes
from hypersd_pipeline.recipes.feedback import AnnotatedData
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.retraining.config import RetrainConfig
from hypersd_pipeline.retraining.run import Retraining, Watched, watch
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.distributed import ComputeConfig
from hypersd_pipeline.training.loop import MetricSink


def watch_node(manifest: Manifest, latents: LatentCache, models: ModelRegistry, config: RetrainConfig) -> Watched:
    """See `retraining.run.watch`."""
    return watch(manifest, latents, models, config)


def challenge_node(
    watched: Watched,
    manifest: Manifest,
    data: DataConfig,
    latents: LatentCache,
    teacher: TeacherConfig,
    evaluation: EvaluationConfig,
    config: RetrainConfig,
    models: ModelRegistry,
    checkpoints: CheckpointStore,
    metric_stream: MetricSink,
    compute: ComputeConfig,
) -> tuple[dict[str, Any], str]:
    """The decision as a report and in words. See `retraining.run.Retraining`."""
    source, outputs = AnnotatedData(manifest, data, latents), Outputs(checkpoints, metric_stream, compute)
    decision = Retraining(source, teacher, evaluation, config, models, outputs).run(watched)
    return decision.report(), decision.markdown()


def create_pipeline(**_: Any) -> Pipeline:
    """Data preparation, then ``params:retrain`` and ``model_registry`` -> ``retrain_decision``, ``retrain_report``."""
    shared = {"manifest": "manifest", "latents": "latents", "models": "model_registry", "config": "params:retrain"}
    parameters = {"data": "params:data", "teacher": "params:teacher", "evaluation": "params:evaluation"}
    challenge = {**shared, **parameters, **HANDLES, "watched": "watched"}
    retrain = Pipeline(
        [
            Node(watch_node, shared, "watched", name="watch"),
            Node(challenge_node, challenge, ["decision", "report"], name="challenge"),
        ],
        namespace="retrain",
        parameters={"params:retrain", "params:compute", *parameters.values()},
        inputs={"manifest": "manifest", "latents": "latents", "model_registry": "model_registry"},
        outputs={"decision": "retrain_decision", "report": "retrain_report"},
    )
    return Pipeline([*data_nodes(), *retrain.nodes])
