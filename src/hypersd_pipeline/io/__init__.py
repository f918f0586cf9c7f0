"""Kedro datasets: the only place where nodes' inputs and outputs meet files."""

from hypersd_pipeline.io.checkpoints import CheckpointsDataset
from hypersd_pipeline.io.images import ImageDataset
from hypersd_pipeline.io.lora import LoRADataset
from hypersd_pipeline.io.metrics import MetricsDataset, MetricStreamDataset

__all__ = ["CheckpointsDataset", "ImageDataset", "LoRADataset", "MetricStreamDataset", "MetricsDataset"]
