"""The adversarial losses and their balance, by hand."""

import pytest
import torch

from hypersd_pipeline.objectives import adversarial


def test_losses_by_hand():
    real, fake = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])
    softplus = lambda x: torch.log1p(torch.exp(torch.tensor(x)))  # noqa: E731
    assert adversarial.discriminator_loss(real, fake).item() == pytest.approx(
        float((softplus(0.0) + softplus(-2.0)) / 2 + (softplus(0.0) + softplus(-1.0)) / 2)
    )
    assert adversarial.generator_loss(fake).item() == pytest.approx(float((softplus(0.0) + softplus(1.0)) / 2))
    scaled = adversarial.balanced(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]))
    assert torch.allclose(scaled, torch.tensor([0.6, 0.8]))
    assert torch.equal(adversarial.balanced(torch.tensor([3.0]), torch.zeros(1)), torch.tensor([3.0]))
    assert torch.isfinite(adversarial.balanced(torch.zeros(2), torch.ones(2))).all()
