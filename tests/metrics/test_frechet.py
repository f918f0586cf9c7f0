"""The Frechet distance against scipy's matrix root and torchmetrics, and its intervals against repeated draws."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from hypersd_pipeline.metrics.frechet import frechet_distance, frechet_estimate, influence, mean_estimate


def features(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated features: one fixed mixing matrix for all seeds."""
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99)).double() / d**0.5
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double() @ mix + shift


def by_matrix_root(x: Tensor, y: Tensor) -> float:
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum()) + float(np.trace(a + b - 2 * root))


@pytest.mark.parametrize(("n", "m", "d"), [(60, 60, 12), (40, 70, 12), (200, 30, 25)])
def test_equals_the_matrix_root_formula(n: int, m: int, d: int) -> None:
    x, y = features(n, d, 1), 1.3 * features(m, d, 2, shift=0.2)
    assert frechet_distance(x, y) == pytest.approx(by_matrix_root(x, y), rel=1e-8)


def test_equals_torchmetrics_with_fewer_samples_than_features() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flatten(nn.Module):
        num_features = 48

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    metric = FrechetInceptionDistance(feature=Flatten(), normalize=False, input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    x, y = features(20, 48, 3), features(24, 48, 4, shift=0.3)
    metric.update(x.view(-1, 3, 4, 4), real=True)
    metric.update(y.view(-1, 3, 4, 4), real=False)
    # torchmetrics takes the roots of eigenvalues of a singular product, which are noise of 1e-8 where they should be 0
    assert frechet_distance(x, y) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_is_zero_for_equal_sets_and_the_squared_shift_for_moved_ones() -> None:
    x = features(30, 64, 5)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 0.5) == pytest.approx(64 * 0.25, rel=1e-9)


@pytest.mark.parametrize(("n", "d"), [(80, 40), (60, 150)])
def test_interval_has_the_width_that_repeated_draws_have(n: int, d: int) -> None:
    draws = [frechet_distance(features(n, d, 100 + i, shift=0.3), features(n, d, 500 + i)) for i in range(80)]
    estimates = [frechet_estimate(features(n, d, 100 + i, shift=0.3), features(n, d, 500 + i), seed=i) for i in range(8)]
    width = float(np.mean([e.high - e.low for e in estimates])) / 2
    assert width == pytest.approx(1.96 * float(np.std(draws)), rel=0.35)
    assert all(e.low < e.value < e.high for e in estimates)


@pytest.mark.parametrize(("n", "m", "d"), [(30, 25, 40), (50, 25, 12), (50, 60, 12)])
def test_influence_is_the_derivative_by_row_weights(n: int, m: int, d: int) -> None:
    x, y = features(n, d, 7, shift=0.2), features(m, d, 8)

    def weighted(weights: Tensor) -> float:
        mean = weights @ x
        a, b = (x - mean) * (weights * n / (n - 1)).sqrt()[:, None], (y - y.mean(0)) / (m - 1) ** 0.5
        return float((mean - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())

    move = torch.randn(n, generator=torch.Generator().manual_seed(1)).double()
    move = (move - move.mean()) / n
    equal = torch.full((n,), 1 / n, dtype=torch.float64)
    slope = (weighted(equal + 1e-5 * move) - weighted(equal - 1e-5 * move)) / 2e-5
    assert float(influence(x, y)[0] @ move) == pytest.approx(slope, rel=1e-4)
    assert torch.allclose(influence(x, y)[0], influence(y, x)[1])


def test_pairs_are_drawn_together() -> None:
    """With the reference equal to the samples plus a constant, every paired resample has one distance."""
    x = features(40, 10, 9)
    paired = frechet_estimate(x, x + 1, paired=True)
    assert paired.high - paired.low < 1e-6
    assert frechet_estimate(x, x + 1).high - paired.value > 0.1


def test_mean_interval_covers_the_mean_in_19_of_20_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for i in range(200):
        estimate = mean_estimate(torch.randn(50, generator=generator) + 2, seed=i)
        covered += estimate.low <= 2 <= estimate.high
    assert 180 <= covered <= 198


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="features must be"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(4, 5))
