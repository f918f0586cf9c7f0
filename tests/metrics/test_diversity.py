"""Diversity, by hand."""

import pytest
import torch

from hypersd_pipeline.metrics.diversity import pairwise_distance


def test_diversity_by_hand():
    same = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    right_angle = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # two of three pairs are at a right angle
    assert pairwise_distance(torch.stack([same, right_angle])).tolist() == pytest.approx([0.0, 2 / 3])
