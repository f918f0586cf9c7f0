"""InfoNCE."""

import pytest
import torch

from hypersd_pipeline.objectives.contrastive import info_nce


def test_info_nce_skips_equal_captions_and_matches_the_formula() -> None:
    unit = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    loss = info_nce(unit, unit, torch.tensor(5.0), same)
    logits = 5 * unit @ unit.T
    rows = [torch.logsumexp(torch.stack([logits[i, j] for j in range(4) if i == j or not same[i, j]]), 0) - logits[i, i] for i in range(4)]
    assert float(loss) == pytest.approx(float(torch.stack(rows).mean()), rel=1e-5)
