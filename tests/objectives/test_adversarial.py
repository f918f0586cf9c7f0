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


def test_other_losses_by_hand():
    real, fake = torch.tensor([0.0, 2.0]), torch.tensor([0.5, -3.0])
    assert adversarial.discriminator_loss(real, fake, "hinge").item() == pytest.approx((1 + 0) / 2 + (1.5 + 0) / 2)
    assert adversarial.generator_loss(fake, real, "hinge").item() == pytest.approx(1.25)
    paired = torch.log1p(torch.exp(torch.tensor([0.5, -5.0]))).mean()
    assert adversarial.discriminator_loss(real, fake, "relativistic").item() == pytest.approx(paired.item())
    other = torch.log1p(torch.exp(torch.tensor([-0.5, 5.0]))).mean()
    assert adversarial.generator_loss(fake, real, "relativistic").item() == pytest.approx(other.item())
    with pytest.raises(ValueError, match="compares fake logits with real ones"):
        adversarial.generator_loss(fake, kind="relativistic")


def test_the_balance_s_factor_is_capped():
    """A gradient of 1e-6 is raised to at most 1e-5 by a cap of 10, and one that needs less is not touched by it."""
    reference = torch.tensor([0.0, 1.0])
    assert torch.allclose(adversarial.balanced(torch.tensor([1e-6, 0.0]), reference, cap=10), torch.tensor([1e-5, 0.0]))
    assert torch.allclose(adversarial.balanced(torch.tensor([0.3, 0.4]), reference, cap=10), torch.tensor([0.6, 0.8]))
