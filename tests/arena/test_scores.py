"""Win rates and Bradley-Terry scores against values that were worked out by hand or in another way."""

import math

import numpy as np
import pytest
from arenas import contender, vote
from sklearn.linear_model import LogisticRegression

from hypersd_pipeline.arena.scores import Tally, bradley_terry, score, tally, win_rate

A, B, C = (contender("teacher", 25), contender("k4", 4), contender("k1", 1))


def test_the_interval_of_a_win_rate_is_wilson_s():
    """3 of 4: centre (p + z^2 / 2n) / (1 + z^2 / n), half width z sqrt(p (1 - p) / n + z^2 / 4 n^2) / (1 + z^2 / n)."""
    found, z, p, n = win_rate(3, 1), 1.959964, 0.75, 4
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert (found.value, found.low, found.high) == pytest.approx((0.75, centre - half, centre + half), abs=1e-6)
    assert (found.low, found.high) == pytest.approx((0.3006, 0.9544), abs=1e-4)


def test_two_contenders_by_hand():
    """3 wins to 1, and half a vote each: odds 7 to 3. The variance of their log is 1 / (n p q). A score is half of it from the mean."""
    first, second = bradley_terry(Tally(np.array([[0.0, 3.0], [1.0, 0.0]]), np.zeros((2, 2))))
    assert first.value - second.value == pytest.approx(400 * math.log10(7 / 3), abs=1e-3)
    assert first.value + second.value == pytest.approx(2000)
    half = 1.96 * 400 / math.log(10) * math.sqrt(1 / (5 * 0.7 * 0.3)) / 2
    assert first.high - first.value == first.value - first.low == pytest.approx(half, rel=1e-4)


def test_ties_are_half_a_vote_each():
    ties = bradley_terry(Tally(np.zeros((2, 2)), np.array([[0.0, 8.0], [8.0, 0.0]])))
    halves = bradley_terry(Tally(np.array([[0.0, 4.0], [4.0, 0.0]]), np.zeros((2, 2))))
    assert [one.value for one in ties] == pytest.approx([1000, 1000]) and ties[0].low == pytest.approx(halves[0].low)


def test_many_contenders_as_a_logistic_regression_fits_them():
    rng = np.random.default_rng(0)
    wins = rng.integers(0, 30, (5, 5)).astype(float)
    np.fill_diagonal(wins, 0)
    rows, targets, weights = [], [], []
    for i in range(5):
        for j in range(5):
            if i != j:
                rows.append(np.eye(5)[i] - np.eye(5)[j])
                targets.append(1)
                weights.append(wins[i, j] + 0.5)
                rows.append(np.eye(5)[j] - np.eye(5)[i])
                targets.append(0)
                weights.append(wins[i, j] + 0.5)
    fitted = LogisticRegression(C=1e8, fit_intercept=False, tol=1e-12, max_iter=10_000).fit(rows, targets, weights)
    theta = fitted.coef_[0] - fitted.coef_[0].mean()
    found = bradley_terry(Tally(wins, np.zeros((5, 5))))
    assert [one.value for one in found] == pytest.approx(1000 + 400 / math.log(10) * theta, abs=0.01)


def test_who_never_lost_has_a_finite_score_and_order_of_contenders_does_not_matter():
    wins = np.array([[0.0, 9.0, 9.0], [0.0, 0.0, 5.0], [0.0, 4.0, 0.0]])
    found, turned = bradley_terry(Tally(wins, np.zeros((3, 3)))), bradley_terry(Tally(wins[::-1, ::-1], np.zeros((3, 3))))
    assert all(math.isfinite(x) for one in found for x in (one.value, one.low, one.high))
    assert found[0].value > found[1].value > found[2].value
    assert [one.value for one in found] == pytest.approx([one.value for one in turned[::-1]], abs=1e-3)


def test_votes_are_counted_by_contender_and_not_by_side():
    votes = [vote(A, B, "left"), vote(B, A, "right"), vote(B, A, "left"), vote(A, B, "neither")]
    counted = tally(votes, [A.key, B.key])
    assert counted.wins.tolist() == [[0, 2], [1, 0]] and counted.ties.tolist() == [[0, 1], [1, 0]]


def test_the_metrics_of_a_study_and_its_table():
    votes = [vote(A, B, "left", "ann"), vote(B, A, "right", "ann"), vote(B, A, "left", "bob"), vote(A, B, "neither", "bob")]
    metrics, table = score(votes, [A, B, C])
    assert (metrics["votes"], metrics["voters"], metrics["ties"]) == (4, 2, 0.25)
    assert metrics["left"] == pytest.approx(2 / 3) and metrics["win_rate/teacher_25_steps"] == pytest.approx(2 / 3)
    assert metrics["win_rate/k4_4_steps"] == pytest.approx(1 / 3) and "win_rate/k1_1_steps" not in metrics
    assert metrics["win_rate/k4_4_steps_low"] < 1 / 3 < metrics["win_rate/k4_4_steps_high"]
    assert metrics["bradley_terry/teacher_25_steps"] > metrics["bradley_terry/k4_4_steps"]
    assert "| Teacher, 25 steps - LoRA k4, 4 steps | 2 | 1 | 1 | 67% (21% to 94%) |" in table
    assert "4 votes of 2 voters. 25% found no difference. 67% of the others chose the left image" in table
    assert "| LoRA k1, 1 step | 0 | - |" in table


def test_a_study_without_votes_or_without_a_decided_one():
    metrics, table = score([], [A, B])
    assert metrics == {"votes": 0, "voters": 0} and "no votes" in table
    metrics, table = score([vote(A, B, "neither")], [A, B])
    assert metrics["ties"] == 1 and "left" not in metrics and metrics["bradley_terry/teacher_25_steps"] == pytest.approx(1000)
