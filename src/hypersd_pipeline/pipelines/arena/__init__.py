"""Models side by side on a page, blind votes, and their scores."""

from hypersd_pipeline.pipelines.arena.pipeline import create_pipeline

__all__ = ["create_pipeline"]
