"""Differences of two models over the same prompts, their intervals, and the sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hypersd_pipeline.comparison.verdict import RESAMPLES, Difference, judge, paired_differences
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.scores import PromptScores, read_scores, write_scores
from hypersd_pipeline.metrics.frechet import frechet_distance, frechet_estimate

PROMPTS = [f"prompt {i}" for i in range(60)]
IDENTITY = {"seed": "0", "reference": "r", "judges": "j"}


def scores(values: dict[int, dict[str, Tensor]], prompts: list[str] = PROMPTS, **identity: str) -> PromptScores:
    return PromptScores(prompts, IDENTITY | identity, values)


def drawn(seed: int, n: int = 60, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Scores of two models that find the same prompts hard. The second is better by `shift`, give or take 0.1 for a prompt."""
    generator = torch.Generator().manual_seed(seed)
    hard = torch.randn(n, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(2, n, generator=generator, dtype=torch.float64)
    return hard + noise[0], hard + noise[1] + shift


def clip(seed: int, shift: float) -> tuple[PromptScores, PromptScores]:
    a, b = drawn(seed, shift=shift)
    return scores({4: {"clip_score": a}}), scores({4: {"clip_score": b}})


# --- intervals ---------------------------------------------------------------------------------------------------------------------------


def test_an_interval_holds_the_true_difference_19_times_of_20():
    found = [paired_differences(*clip(seed, 0.05), resamples=400)[0] for seed in range(200)]
    assert 0.90 <= sum(one.low <= 0.05 <= one.high for one in found) / len(found) <= 0.98


def test_equal_prompts_make_the_interval_narrow():
    first, second = clip(0, 0.1)
    together = paired_differences(first, second)[0]
    apart = judge(first, scores(dict(second.values), seed="1"))
    assert apart.unpaired == "The seeds of the noise differ, so the runs are compared as two independent samples."
    assert apart.differences[0].value == together.value
    assert together.high - together.low < 0.2 * (apart.differences[0].high - apart.differences[0].low)
    assert together.better == "second" and apart.differences[0].better is None


def test_the_difference_of_distances_is_that_of_the_metrics_and_its_interval_that_of_redrawn_prompts():
    """A Frechet distance has no mean over images. Its parts are its influences, and their bootstrap is checked against new images."""

    def world(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        real = torch.randn(200, 8, generator=generator, dtype=torch.float64)
        noise = torch.randn(2, 200, 8, generator=generator, dtype=torch.float64)
        return real, 0.6 * real + 0.8 * noise[0] + 0.3, 0.6 * real + 0.8 * noise[1] + 0.5

    def model(images: Tensor, real: Tensor) -> PromptScores:
        rows = frechet_estimate(images, real, resamples=10, paired=True).rows
        return scores({4: {"fd_recon": rows}}, [str(i) for i in range(200)])

    real, a, b = world(0)
    found = paired_differences(model(a, real), model(b, real))[0]
    assert found.value == pytest.approx(frechet_distance(b, real) - frechet_distance(a, real), rel=1e-9)
    assert found.better == "first"
    redrawn = [frechet_distance(b, real) - frechet_distance(a, real) for real, a, b in map(world, range(1, 201))]
    low, high = torch.tensor(redrawn).quantile(torch.tensor([0.025, 0.975])).tolist()
    assert found.high - found.low == pytest.approx(high - low, rel=0.3)


def test_the_same_seed_gives_the_same_interval():
    first, second = clip(0, 0.1)
    assert paired_differences(first, second) == paired_differences(first, second)
    assert paired_differences(first, second, seed=1) != paired_differences(first, second)
    assert paired_differences(first, second) == paired_differences(first, second, resamples=RESAMPLES)


def test_lower_distances_and_higher_scores_are_better():
    distance, score = Difference("fd_recon", 4, 20, 10, -12, -8), Difference("clip_score", 4, 10, 20, 8, 12)
    assert distance.better == score.better == "second"
    assert distance.gain == score.gain == (10, 8, 12)
    assert Difference("fd_recon", 4, 10, 20, 8, 12).better == Difference("image_quality", 4, 20, 10, -12, -8).better == "first"
    assert Difference("clip_score", 4, 1, 2, -1, 3).better is None


# --- what does not pair ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"judges": "k"}, "were measured by other judges"),
        ({"seed": "1"}, "The seeds of the noise differ"),
        ({"reference": "s"}, "The reference images differ"),
        ({"prompts": PROMPTS[::-1]}, "The prompts differ, so champion and challenger do not pair; evaluate both with one"),
        ({"values": {8: {"clip_score": torch.zeros(60)}}}, "the champion was measured at 4 steps and the challenger at 8 steps"),
        ({"values": {4: {"image_quality": torch.zeros(60)}}}, "have no metric in common"),
    ],
)
def test_a_gate_refuses_what_does_not_pair(other, why):
    first, _ = clip(0, 0)
    other = {"values": dict(first.values)} | other
    with pytest.raises(UserError, match=why):
        paired_differences(first, scores(**other))


def test_distances_of_unequal_numbers_of_images_are_left_out():
    a, b = drawn(0)
    first = scores({4: {"fd_recon": a, "clip_score": a}})
    second = scores({4: {"fd_recon": b[:40], "clip_score": b[:40]}}, PROMPTS[:40])
    found = judge(first, second)
    assert [difference.metric for difference in found.differences] == ["clip_score"]
    assert found.unpaired == "The numbers of prompts differ (60 and 40), so distances are left out."


# --- the sentence ------------------------------------------------------------------------------------------------------------------------


def constant(**metrics: float) -> dict[str, Tensor]:
    return {name: torch.full((60,), value, dtype=torch.float64) for name, value in metrics.items()}


def test_the_sentence_names_the_winner_how_much_and_where():
    first = scores({n: constant(fd_x_recon=30, clip_score=10) for n in (1, 2, 4)})
    better = scores({1: constant(fd_x_recon=18, clip_score=9), 2: constant(fd_x_recon=25, clip_score=10), 4: constant(fd_x_recon=30)})
    assert judge(first, better).sentence == (
        "B is better at 1 and 2 steps: its distance is lower by 12 [12, 12] at 1 step and 5 [5, 5] at 2 steps; at 4 steps no difference "
        "can be told. But the CLIP score prefers A at 1 step."
    )
    assert judge(better, first, ("C", "D")).sentence.startswith("C is better at 1 and 2 steps: its distance is lower by 12 [12, 12]")
    assert judge(first, first).sentence == "No difference between A and B can be told at 1, 2 and 4 steps."
    timed = judge(first, first, seconds=(10, 25)).sentence
    assert timed.endswith("B was trained 2.5 times as long.")
    assert judge(first, first, seconds=(10, 10)).sentence.endswith("Both were trained for about the same time.")


# --- the file ----------------------------------------------------------------------------------------------------------------------------


def test_scores_survive_their_file(tmp_path: Path):
    a, b = drawn(3)
    written = scores({8: {"clip_score": a}, 1: {"fd_recon": b, "clip_score": b}}, ["müll, 🙂", *PROMPTS[1:]])
    write_scores(tmp_path, written)
    found = read_scores(tmp_path)
    assert (found.prompts, found.identity, list(found.values)) == (written.prompts, written.identity, [1, 8])
    assert found.values[8]["clip_score"].equal(a) and found.values[1]["fd_recon"].equal(b)


@pytest.mark.parametrize("damage", ["missing", "cut", "another file", "too few", "nan"])
def test_a_damaged_file_of_scores_is_one_sentence(damage, tmp_path: Path):
    rows = torch.ones(60, dtype=torch.float64)
    write_scores(tmp_path, scores({4: {"clip_score": rows[:50] if damage == "too few" else rows * torch.nan if damage == "nan" else rows}}))
    path = tmp_path / "scores.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "another file":
        path.write_text("no tensors")
    with pytest.raises(UserError, match=r"scores\.safetensors is (missing|damaged).*evaluate the model again"):
        read_scores(tmp_path)
