"""The ranking loss (eq. 9)."""

import pytest
import torch

from hypersd_pipeline.objectives.ranking import ranking_loss


def test_ranking_loss_is_the_papers() -> None:
    win, lose = torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.7])
    assert float(ranking_loss(win, lose)) == pytest.approx(float(-torch.sigmoid(win - lose).log().mean()))
