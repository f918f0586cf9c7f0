"""Train a small SOLO on the data set's instance masks, for segmentation feedback on small images."""

from hypersd_pipeline.pipelines.segmentation_model.pipeline import create_pipeline

__all__ = ["create_pipeline"]
