"""The gate, with scores of prompts that are made for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.scores import PromptScores
from hypersd_pipeline.retraining.config import GateConfig
from hypersd_pipeline.retraining.gate import Decision, is_cheaper, judge_metrics, outcome_of
from hypersd_pipeline.retraining.measure import Measured

N = 100
GATE = GateConfig(resamples=300)


def drawn(mean: float, seed: int, spread: float = 1.0) -> Tensor:
    """Scores with exactly this mean and standard deviation: what is hard is hard for every model."""
    hard = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = 0.05 * torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = hard + own
    return mean + spread * (rows - rows.mean()) / rows.std()


def measured(seed: int, steps: int = 1, parameters: int = 1000, masks: float = 0.5, **means: float) -> Measured:
    values = {"fd_x_recon": 100.0, "clip_score": 20.0, "text_image": 0.0, "diversity": 0.4} | means
    rows = {name: drawn(mean, seed, 10.0 if name == "fd_x_recon" else 1.0) for name, mean in values.items()}
    prompts, identity = [f"prompt {i}" for i in range(N)], {"seed": "0", "reference": "r", "judges": "j"}
    diversity = PromptScores(prompts, identity, {steps: {"diversity": rows.pop("diversity")}})
    return Measured(steps, parameters, PromptScores(prompts, identity, {steps: rows}), diversity, {"mask_ap": masks})


CHAMPION = measured(2)


@pytest.mark.parametrize(
    ("challenger", "failing"),
    [
        pytest.param(measured(3, fd_x_recon=97), set(), id="a better distance"),
        pytest.param(measured(3, fd_x_recon=100), {"fd_x_recon"}, id="no better, no cheaper"),
        pytest.param(measured(3, parameters=500, fd_x_recon=103), set(), id="within tolerance and smaller"),
        pytest.param(measured(3, parameters=1500, fd_x_recon=103), {"fd_x_recon"}, id="within tolerance and larger"),
        pytest.param(measured(3, parameters=500, fd_x_recon=107), {"fd_x_recon"}, id="smaller, but beyond tolerance"),
        pytest.param(measured(3, steps=2, parameters=500, fd_x_recon=103), {"fd_x_recon"}, id="smaller, but more steps"),
        pytest.param(measured(3, fd_x_recon=97, clip_score=19.7), {"clip_score"}, id="worse CLIP score"),
        pytest.param(measured(3, fd_x_recon=97, clip_score=19.9), set(), id="a CLIP score within tolerance"),
        pytest.param(measured(3, fd_x_recon=97, text_image=-0.4), {"text_image"}, id="a worse held-out reward"),
        pytest.param(measured(3, fd_x_recon=97, diversity=0.1), {"diversity"}, id="less diverse"),
        pytest.param(measured(3, fd_x_recon=97, masks=0.47), {"mask_ap"}, id="worse masks"),
        pytest.param(measured(3, fd_x_recon=97, masks=0.49), set(), id="masks within tolerance"),
    ],
)
def test_who_passes(challenger: Measured, failing: set[str]):
    checks = judge_metrics(CHAMPION, challenger, GATE)
    assert {check.name for check in checks} == {"fd_x_recon", "clip_score", "text_image", "diversity", "mask_ap"}
    assert {check.name for check in checks if not check.passed} == failing
    assert outcome_of(checks) == ("kept" if failing else "promoted")


def test_each_is_measured_at_its_own_number_of_steps():
    slow = measured(2, steps=4)
    assert is_cheaper(slow, measured(3, steps=1, parameters=2000)) and not is_cheaper(measured(3, steps=1), slow)
    (distance, *_) = judge_metrics(slow, measured(3, steps=1, parameters=2000, fd_x_recon=101), GATE)
    assert distance.passed and "cheaper: 1 step and 2000 numbers instead of 4 steps and 1000" in distance.text
    assert (distance.champion, distance.challenger) == (pytest.approx(100), pytest.approx(101))


def test_a_difference_that_chance_explains_is_no_improvement():
    """On average the challenger is better, but prompt by prompt it is not."""
    noisy: dict[str, Any] = dict(next(iter(CHAMPION.scores.values.values())))
    noise = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noisy["fd_x_recon"] = noisy["fd_x_recon"] + 30 * (noise - noise.mean()) - 1.0
    challenger = replace(CHAMPION, scores=PromptScores(CHAMPION.scores.prompts, CHAMPION.scores.identity, {1: noisy}))
    distance = judge_metrics(CHAMPION, challenger, GATE)[0]
    assert distance.challenger < distance.champion and not distance.passed and distance.low < 0 < distance.high


def test_other_prompts_and_a_missing_distance_are_refused():
    other = replace(CHAMPION.scores, prompts=CHAMPION.scores.prompts[::-1])
    with pytest.raises(UserError, match="do not pair"):
        judge_metrics(CHAMPION, replace(CHAMPION, scores=other), GATE)
    bare = PromptScores(CHAMPION.scores.prompts, CHAMPION.scores.identity, {1: {"clip_score": drawn(20, 2)}})
    with pytest.raises(UserError, match="no distance"):
        judge_metrics(replace(CHAMPION, scores=bare), replace(CHAMPION, scores=bare), GATE)


def test_the_decision_says_why_for_machines_and_for_readers():
    checks = judge_metrics(CHAMPION, measured(3, fd_x_recon=97, clip_score=19.0), GATE)
    decision = Decision("kept", ["It is worse."], "hypersd", "4", "3", checks)
    report = decision.report()
    assert (report["outcome"], report["exit_code"], report["version"], report["champion_before"]) == ("kept", 10, "4", "3")
    assert report["checks"]["clip_score"]["passed"] == 0.0 and report["checks"]["clip_score"]["high"] < 0
    text = decision.markdown()
    assert (
        text.startswith("# hypersd: version 3 stays the champion\n\n- It is worse.\n")
        and "| clip_score | no | CLIP score: 19 instead" in text
    )
    assert Decision("promoted", [], "hypersd", "4", "3").report()["exit_code"] == 0
    assert Decision("promoted", [], "hypersd", "4", "3").headline() == "version 4 is the champion instead of version 3"
