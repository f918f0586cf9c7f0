"""The guard against reward hacking."""

import logging

import pytest
import torch

from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.guard import Guard, GuardConfig
from hypersd_pipeline.training.loop import LoopConfig, make_accelerator, train

LOOP = LoopConfig(steps=12, batch_size=1, learning_rate=0.1, log_every=1, checkpoint_every=4)


def run(path, held_out, steps=12, every=2):
    """A training whose trained reward rises, and whose held-out reward is told. The weight counts the updates."""
    weight = torch.nn.Parameter(torch.zeros(1))
    measured = []

    def measure():
        measured.append(1)
        return {"trained_reward": float(weight.detach()), "held_out_reward": held_out(float(weight.detach()))}

    seen = []
    config = GuardConfig(every=every, prompts=4, patience=2, tolerance=0.05)
    guard = Guard(config, measure, [weight], lambda values, step: seen.append((step, values)), last=steps)
    report = train(
        "toy", parameters=[weight], loss_fn=lambda g: (-weight.sum(), {}), config=LOOP.model_copy(update={"steps": steps}),
        state={"guard": guard, "weight": torch.nn.ParameterList([weight])}, key="k", checkpoints=CheckpointStore(path),
        metrics=lambda m, s: None, accelerator=make_accelerator(LOOP), finished=guard,
    )  # fmt: skip
    return weight, guard, seen, report, measured


def test_training_ends_and_goes_back_when_the_held_out_reward_falls(tmp_path, caplog):
    """It falls from step 6 on (weight above 0.5): two suspicious measurements, steps 6 and 8."""
    with caplog.at_level(logging.WARNING):
        weight, guard, seen, _, _ = run(tmp_path, lambda w: 1.0 if w < 0.5 else 0.0)
    assert [step for step, _ in seen] == [0, 2, 4, 6, 8] and guard.hacked
    assert weight.item() == pytest.approx(0.4, abs=0.01)  # as it was at step 4
    assert guard.metrics_of_ends()["ended_by_guard"] == 1 and guard.metrics_of_ends()["before/held_out_reward"] == 1
    assert "the held-out reward has fallen from 1.000 to 0.000" in caplog.text
    again, other, _, report, measured = run(tmp_path, lambda w: 1.0 if w < 0.5 else 0.0)
    assert again.item() == weight.item() and other.hacked and measured == [] and report["total_skipped_steps"] == 0


def test_a_fall_within_tolerance_or_of_both_is_no_hacking(tmp_path):
    assert not run(tmp_path / "a", lambda w: 1.0 - 0.04 * w)[1].hacked
    weight, guard, seen, report, _ = run(tmp_path / "b", lambda w: 1.0 + w)
    assert not guard.hacked and [step for step, _ in seen] == [0, 2, 4, 6, 8, 10, 12]
    assert weight.item() == pytest.approx(1.2, abs=0.01) and guard.metrics_of_ends()["after/trained_reward"] == pytest.approx(1.2, abs=0.01)
    assert report["mean_step_seconds"] > 0


def test_the_last_measurement_is_at_the_weights_that_are_left(tmp_path):
    weight, guard, seen, _, _ = run(tmp_path, lambda w: 1.0 + w, every=5)
    assert [step for step, _ in seen] == [0, 5, 10, 12]
    assert guard.metrics_of_ends()["after/trained_reward"] == weight.item()


def test_one_suspicious_measurement_between_good_ones_is_forgiven(tmp_path):
    assert not run(tmp_path, lambda w: 0.0 if 0.3 < w < 0.5 or 0.7 < w < 0.9 else 1.0)[1].hacked


def guarded(interval, scores, tolerance=0.05):
    """A guard that measures twice: at the start, and what ``scores`` says of each prompt afterwards."""
    told = iter([torch.linspace(-1, 1, len(scores)), torch.linspace(-1, 1, len(scores)) + scores])
    now: list[torch.Tensor] = []

    def measure():
        now[:] = [next(told)]
        return {"trained_reward": float(1 - len(guard.history) == 0), "held_out_reward": float(now[0].mean())}

    config = GuardConfig(every=1, prompts=len(scores), patience=1, tolerance=tolerance, interval=interval)
    guard = Guard(config, measure, [torch.nn.Parameter(torch.zeros(1))], lambda values, step: None, last=10, scores=lambda: now[0])
    assert guard(0) is False
    return guard


def test_noise_does_not_end_a_training_whose_guard_looks_at_intervals():
    """The mean falls by .1, and single prompts change by 1: with 16 prompts that may be noise, with a change of .01 it is not."""
    signs = torch.tensor([1.0, -1.0] * 8)
    noisy, sure = -0.1 + signs, -0.1 + 0.01 * signs
    assert guarded(False, noisy)(1) and not guarded(True, noisy)(1)
    assert guarded(True, sure)(1) and not guarded(True, sure, tolerance=0.15)(1)


def test_an_interval_is_that_of_the_paired_change_and_lasts_in_a_checkpoint():
    change = -0.1 + 0.3 * torch.tensor([1.0, -1.0] * 8)
    guard = guarded(True, change)
    guard(1)
    half = 1.96 * 0.3 * (16 / 15) ** 0.5 / 4
    values = guard.history[-1]
    assert values["held_out_change_low"] == pytest.approx(-0.1 - half) and values["held_out_change_high"] == pytest.approx(-0.1 + half)
    other = guarded(True, change)
    other.load_state_dict(guard.state_dict())
    assert torch.equal(other.first_scores, guard.first_scores) and other.hacked == guard.hacked
    assert "held_out_change_low" not in guarded(False, change).history[-1]
