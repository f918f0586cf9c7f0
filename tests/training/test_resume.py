"""Checkpoints that are damaged, or of another configuration: what is continued, what starts anew, and what is said."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.training.checkpoints import PROGRESS, CheckpointStore, Identity, superfluous
from hypersd_pipeline.training.loop import LoopConfig, TrainingStopped, make_accelerator, train
from hypersd_pipeline.training.resume import differences

LOOP = {"steps": 4, "batch_size": 4, "learning_rate": 0.1, "log_every": 1, "checkpoint_every": 2}


def run(path, restart=False, data="a", stop_at=None, **changes):
    """A training of one weight. Returns it, the steps that were taken, and the loop's report."""
    config = LoopConfig(**{**LOOP, **changes})
    weight, seen = torch.nn.Parameter(torch.ones(1)), []

    def metrics(values, step):
        seen.append((step, values["learning_rate"]))
        if step == stop_at:
            raise TrainingStopped("enough")

    report = train(
        "toy", parameters=[weight], loss_fn=lambda g: ((weight - torch.randn(1, generator=g)).square().sum(), {}), config=config,
        state={"weight": torch.nn.ParameterList([weight])}, key=Identity({"loop": config.identity(), "data": data, "guidance": [3.0, 5.0]}),
        checkpoints=CheckpointStore(path / "stage", restart=restart), metrics=metrics, accelerator=make_accelerator(config),
    )  # fmt: skip
    return weight.item(), seen, report


def newest(path):
    return sorted((path / "stage").rglob("step-*.pt"))[-1]


def test_one_flipped_bit_is_seen_and_the_checkpoint_before_is_taken(tmp_path, caplog):
    whole = run(tmp_path / "whole")[0]
    run(tmp_path / "other")
    damaged = newest(tmp_path / "other")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    weight, seen, _ = run(tmp_path / "other")
    assert weight == whole and [step for step, _ in seen] == [3, 4]
    assert f"{damaged}: damaged checkpoint passed over (its content has another hash than its name says)" in caplog.text


@pytest.mark.parametrize("content", [[1, 2], {"step": 4}, {"step": "4", "state": {}}, {"step": 4, "state": {"counts": {}}}])
def test_a_checkpoint_of_another_form_is_passed_over(tmp_path, content):
    """Its name says no hash, as those of earlier versions."""
    whole = run(tmp_path / "whole")[0]
    run(tmp_path / "other")
    file = newest(tmp_path / "other")
    file.unlink()
    torch.save(content, file.with_name("step-00000004.pt"))
    weight, seen, _ = run(tmp_path / "other")
    assert weight == whole and [step for step, _ in seen] == [3, 4]


def test_more_steps_continue_and_fewer_start_anew(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path)
    _, longer, report = run(tmp_path, steps=6)
    assert [step for step, _ in longer] == [5, 6] and report["mean_step_seconds"] > 0
    assert "stage: goes on from step 4 of an earlier training (loop.steps 4 -> 6)" in caplog.text
    assert run(tmp_path)[1] == []  # the shorter one is as it was
    assert [step for step, _ in run(tmp_path, steps=3)[1]] == [1, 2, 3]
    assert "loop.steps was 6 and is 3, so that its checkpoint of step 6 does not fit. The stage starts anew." in caplog.text


def test_longer_equals_the_same_training_at_once(tmp_path):
    run(tmp_path / "parts")
    parts, *_ = run(tmp_path / "parts", steps=6)
    whole, *_ = run(tmp_path / "whole", steps=6)
    assert parts == whole  # at a constant rate


def test_other_passes_continue(tmp_path):
    with pytest.raises(TrainingStopped):
        run(tmp_path, stop_at=3)
    assert [step for step, _ in run(tmp_path, accumulate=2)[1]] == [3, 4]


def test_logging_never_starts_anew(tmp_path):
    run(tmp_path)
    assert run(tmp_path, log_every=2, checkpoint_every=1, max_rollbacks=0)[1] == []


def test_another_rate_starts_anew_or_holds_from_here_on(tmp_path, caplog):
    run(tmp_path)
    assert [step for step, _ in run(tmp_path, learning_rate=0.05)[1]] == [1, 2, 3, 4]
    assert "stage: loop.learning_rate was 0.1 and is 0.05" in caplog.text
    _, seen, _ = run(tmp_path, learning_rate=0.02, steps=6, new_rate_from_here=True)
    assert seen == [(5, 0.02), (6, 0.02)]


def test_everything_that_is_different_is_named(tmp_path, caplog):
    run(tmp_path)
    run(tmp_path, data="b", learning_rate=0.05, weight_decay=0.5, betas=(0.5, 0.9))
    assert "data was a and is b; loop.betas was [0.9, 0.999] and is [0.5, 0.9]; loop.learning_rate was 0.1" in caplog.text
    assert "(and 1 more)" in caplog.text and f"The old checkpoints stay in {tmp_path / 'stage'}" in caplog.text


def test_more_than_an_hour_is_left_behind_on_purpose_only(tmp_path):
    run(tmp_path)
    progress = next((tmp_path / "stage").rglob(PROGRESS))
    progress.write_text(json.dumps({"step": 4, "seconds": 200 * 3600.0}))
    with pytest.raises(UserError, match=r"data was a and is b, .*; 200\.0 hours of training would be left behind\. .*restart=true"):
        run(tmp_path, data="b")
    assert len(run(tmp_path, data="b", restart=True)[1]) == 4
    assert run(tmp_path)[1] == []  # and the old one is still there


def test_differences_by_hand():
    old = {"loop": {"steps": 4, "betas": (0.9, 0.99)}, "terms": {"a": {"weight": 1.0}}, "start": None}
    new = {"loop": {"steps": 4, "betas": [0.9, 0.99]}, "terms": {"a": {"weight": 2.0}, "b": {"weight": 1.0}}, "start": "x"}
    assert differences(old, new) == {"terms.a.weight": (1.0, 2.0), "terms.b.weight": (None, 1.0), "start": (None, "x")}


def test_seconds_add_up_over_interruptions(tmp_path):
    with pytest.raises(TrainingStopped):
        run(tmp_path, stop_at=3)
    first = json.loads(next((tmp_path / "stage").rglob(PROGRESS)).read_text())
    run(tmp_path)
    last = json.loads(next((tmp_path / "stage").rglob(PROGRESS)).read_text())
    assert (first["step"], last["step"]) == (2, 4) and last["seconds"] > first["seconds"] > 0


def test_what_is_superfluous_is_all_but_the_newest_checkpoint_of_each_stage(tmp_path):
    for stage, key, step, age in [("a", "old", 1, 1), ("a", "old", 2, 2), ("a", "new", 1, 3), ("a", "new", 2, 4), ("b", "only", 7, 0)]:
        path = tmp_path / stage / key / f"step-{step:08d}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (age, age))
    (tmp_path / "c").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in superfluous(tmp_path)]
    assert found == ["a/old", "a/new/step-00000001.pt"] and superfluous(tmp_path / "none") == []


def test_two_processes_do_not_train_the_same_stage(tmp_path):
    store = CheckpointStore(tmp_path / "stage")
    code = "import sys, time; from hypersd_pipeline.training.checkpoints import CheckpointStore\n"
    code += "with CheckpointStore(sys.argv[1]).locked('k8'): print('locked', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(store.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(
            UserError, match=rf"^toy: process {other.pid} on .* is at it \(.*\.lock is locked\), so wait until it ends or stop it\.$"
        ):
            run(tmp_path)
    finally:
        other.kill()
        other.wait()
    assert run(tmp_path)[1]  # a killed process holds nothing
