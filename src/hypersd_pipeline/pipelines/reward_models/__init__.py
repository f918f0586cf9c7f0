"""Training of the text-image reward and of the held-out reward, on preference pairs."""

from hypersd_pipeline.pipelines.reward_models.pipeline import create_pipeline

__all__ = ["create_pipeline"]
