"""The min-SNR denoising loss."""

import pytest
import torch

from hypersd_pipeline.diffusion.process import Process
from hypersd_pipeline.objectives.denoising import epsilon_loss
from hypersd_pipeline.recipes.teacher.unet import SCHEDULER_CONFIG


def test_epsilon_loss_by_hand() -> None:
    process = Process.from_config(SCHEDULER_CONFIG)
    t = torch.tensor([10, 900])
    snr = (process.alphas / process.sigmas)[t] ** 2
    output, z = torch.zeros(2, 1, 2, 2), torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 2.0)])
    by_hand = (5 / snr[0] * 1.0 + 1.0 * 4.0) / 2  # snr at 10 is above gamma, at 900 below
    assert epsilon_loss(output, z, t, process, 5.0).item() == pytest.approx(by_hand.item(), rel=1e-5)
