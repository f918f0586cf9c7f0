"""Data preparation: generate (or point to) the data set, validate its rows, cache latents and text embeddings."""

from hypersd_pipeline.pipelines.data_prep.pipeline import create_pipeline

__all__ = ["create_pipeline"]
