"""Train the small teacher that ships with the project."""

from hypersd_pipeline.pipelines.teacher.pipeline import create_pipeline

__all__ = ["create_pipeline"]
