"""The loop: exact resume, skipped steps, interruption, and checkpoints that do not fit."""

import os
import signal

import pytest
import torch

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import LoopConfig, TrainingStopped, learning_rate_at, make_accelerator, make_optimizer, train

CONFIG = LoopConfig(steps=12, batch_size=4, learning_rate=1e-2, schedule="cosine", warmup_steps=2, log_every=1, checkpoint_every=4)


def run(path, config=CONFIG, loss=None, key="a", seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Linear(3, 3)
    average = torch.nn.Linear(3, 3)
    average.load_state_dict(net.state_dict())
    seen = []

    def loss_fn(generator):
        x = torch.randn(4, 3, generator=generator)
        return ((net(x) - x.flip(1)) ** 2).mean() if loss is None else loss(net, x, len(seen)), {}

    metrics = train(
        "toy",
        parameters=net.parameters(),
        loss_fn=loss_fn,
        config=config,
        state={"net": net, "average": average},
        key=key,
        checkpoints=CheckpointStore(path),
        metrics=lambda m, s: seen.append((s, m)),
        accelerator=make_accelerator(CONFIG),
        after_update=lambda: ema_update(list(average.parameters()), list(net.parameters()), 0.9),
    )
    return net.weight.detach().clone(), average.weight.detach().clone(), seen, metrics


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole")

    def interrupting(net, x, step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return ((net(x) - x.flip(1)) ** 2).mean()

    with pytest.raises(TrainingStopped, match="interrupted after step 7"):
        run(tmp_path / "parts", loss=interrupting)
    resumed = run(tmp_path / "parts", seed=99)  # the new process starts from other weights: the checkpoint must win
    assert torch.equal(whole[0], resumed[0])
    assert torch.equal(whole[1], resumed[1])
    assert [s for s, _ in resumed[2]] == [8, 9, 10, 11, 12]


def test_finished_run_is_not_repeated(tmp_path):
    first = run(tmp_path)
    again = run(tmp_path, seed=5)
    assert torch.equal(first[0], again[0])
    assert again[2] == []
    assert again[3] == first[3] and again[3]["mean_images_per_second"] > 0  # the metrics of the run that trained


def test_changed_key_starts_anew_and_leaves_the_old_one(tmp_path):
    first = run(tmp_path)
    assert next(s for s, _ in run(tmp_path, key="b")[2]) == 1
    assert torch.equal(run(tmp_path, seed=5)[0], first[0])


def test_stages_of_one_process_may_differ_in_precision():
    for precision in ("bf16", "no", "bf16"):
        assert make_accelerator(CONFIG.model_copy(update={"mixed_precision": precision})).mixed_precision == precision


def test_bf16_convolutions_end_with_the_training(tmp_path):
    config = CONFIG.model_copy(update={"steps": 1, "conv_precision": "bf16"})
    weight, seen = torch.nn.Parameter(torch.zeros(1)), []

    def loss_fn(generator):
        seen.append(torch.backends.mkldnn.conv.fp32_precision)
        return weight.sum(), {}

    train(
        "toy", parameters=[weight], loss_fn=loss_fn, config=config, state={}, key="k", checkpoints=CheckpointStore(tmp_path),
        metrics=lambda m, s: None, accelerator=make_accelerator(config),
    )  # fmt: skip
    assert seen == ["bf16"] and torch.backends.mkldnn.conv.fp32_precision == "ieee"


def test_batch_must_divide_into_its_passes():
    with pytest.raises(ValueError, match="batch_size 64 is not a multiple of accumulate 3"):
        LoopConfig(steps=1, batch_size=64, accumulate=3, learning_rate=1e-3)
    assert CONFIG.identity() == CONFIG.model_copy(update={"log_every": 7}).identity()
    assert CONFIG.identity() != CONFIG.model_copy(update={"steps": 7}).identity()


def test_non_finite_steps_are_skipped_and_counted(tmp_path):
    def sometimes(net, x, step):
        value = ((net(x) - x) ** 2).mean()
        return value * float("nan") if step in (3, 4) else value

    weights, _, _, metrics = run(tmp_path, loss=sometimes)
    assert metrics["total_skipped_steps"] == 2
    assert torch.isfinite(weights).all()
    with pytest.raises(TrainingStopped, match=r"10 steps in a row.*lower the learning rate"):
        run(tmp_path / "nan", loss=lambda net, x, step: net(x).sum() * float("nan"))


def test_a_bad_streak_goes_back_to_the_last_good_checkpoint(tmp_path, caplog):
    """Steps 7 .. 9 are not finite: back to step 4, half the learning rate, other draws. Then it ends as any other run."""
    config = CONFIG.model_copy(update={"max_bad_steps": 3, "checkpoint_every": 4, "schedule": "constant", "warmup_steps": 0})
    calls, draws = [], []

    def loss(net, x, seen):
        calls.append(1)
        draws.append(x.clone())
        value = ((net(x) - x.flip(1)) ** 2).mean()
        return value * float("nan") if len(calls) in (7, 8, 9) else value

    weights, _, seen, metrics = run(tmp_path, config=config, loss=loss)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 10, 11, 12]
    assert {m["learning_rate"] for step, m in seen[:9]} == {0.01} and {m["learning_rate"] for step, m in seen[9:]} == {0.005}
    assert not torch.equal(draws[4], draws[9])  # step 5, the first time and the second
    assert (metrics["total_skipped_steps"], metrics["total_rollbacks"]) == (3, 1) and torch.isfinite(weights).all()
    assert "toy: a non-finite loss or gradient (main); such steps are skipped" in caplog.text
    assert "3 steps in a row had a non-finite loss or gradient (main); back to the checkpoint of step 4" in caplog.text
    again = run(tmp_path, config=config, loss=loss, seed=5)
    assert torch.equal(again[0], weights) and again[3] == metrics


def test_rollbacks_are_limited_and_resumable(tmp_path):
    config = CONFIG.model_copy(update={"max_bad_steps": 2, "max_rollbacks": 1, "checkpoint_every": 4})

    def broken(net, x, seen):
        return ((net(x) - x) ** 2).mean() * (float("nan") if seen >= 5 else 1.0)

    with pytest.raises(TrainingStopped, match=r"2 steps in a row .* after 1 returns to an earlier checkpoint; lower the learning rate"):
        run(tmp_path, config=config, loss=broken)
    assert [p.name[:13] for p in (tmp_path / "a").glob("step-*")] == ["step-00000004"]  # nothing from the bad streak
    repaired = run(tmp_path, config=config)
    assert [step for step, _ in repaired[2]] == [5, 6, 7, 8, 9, 10, 11, 12]


def test_companions_step_with_the_main_optimiser_or_not_at_all(tmp_path):
    """A discriminator's non-finite gradient holds back both. Its state is part of the checkpoint."""
    net, rival = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before = [p.detach().clone() for p in (net.weight, rival.weight)]
    optimizer = torch.optim.AdamW(rival.parameters(), lr=0.1, betas=(0.0, 0.99))
    poison, moved = [float("nan")], []

    def loss_fn(generator):
        x = torch.randn(4, 2, generator=generator)
        (rival(x).mean() * poison[0]).backward(inputs=list(rival.parameters()))
        moved.append([not torch.equal(a, b) for a, b in zip(before, (net.weight, rival.weight), strict=True)])
        if len(moved) == 2:
            poison[0] = 1.0
        return net(x).square().mean(), {}

    metrics = train(
        "toy", parameters=net.parameters(), loss_fn=loss_fn, config=CONFIG.model_copy(update={"steps": 4}), key="k",
        state={"net": net, "rival": rival}, checkpoints=CheckpointStore(tmp_path), metrics=lambda m, s: None,
        accelerator=make_accelerator(CONFIG), companions={"rival": optimizer}, constants={"unet_forward_seconds": 0.5},
    )  # fmt: skip
    assert moved == [[False, False], [False, False], [False, False], [True, True]]
    assert metrics["total_skipped_steps"] == 2 and metrics["unet_forward_seconds"] == 0.5
    saved = CheckpointStore(tmp_path).load("k")[1]
    assert saved["optimizers"]["rival"]["state"][0]["step"] == 2 and rival.weight.grad is None


def test_a_rollback_halves_the_companions_rate_too_and_names_who_failed(tmp_path, caplog):
    net, rival = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    optimizer, rates = torch.optim.AdamW(rival.parameters(), lr=0.1), []

    def loss_fn(generator):
        rates.append(optimizer.param_groups[0]["lr"])
        factor = float("nan") if len(rates) in (3, 4) else 1.0
        (rival(torch.randn(4, 2, generator=generator)).mean() * factor).backward(inputs=list(rival.parameters()))
        return net(torch.ones(1, 2)).square().mean(), {}

    def run(steps):
        config = CONFIG.model_copy(update={"steps": steps, "max_bad_steps": 2, "checkpoint_every": 2})
        return train(
            "toy", parameters=net.parameters(), loss_fn=loss_fn, config=config, key="k", state={"net": net, "rival": rival},
            checkpoints=CheckpointStore(tmp_path), metrics=lambda m, s: None, accelerator=make_accelerator(CONFIG),
            companions={"rival": optimizer},
        )  # fmt: skip

    assert run(4)["total_rollbacks"] == 1
    assert rates == pytest.approx([0.1] * 4 + [0.05] * 2)
    assert "2 steps in a row had a non-finite loss or gradient (rival); back to the checkpoint of step 2" in caplog.text
    optimizer.param_groups[0]["lr"] = 0.1  # as a new process makes it
    run(6)
    assert rates[6:] == pytest.approx([0.05] * 2)


def test_accumulation_equals_one_large_batch(tmp_path):
    torch.manual_seed(0)
    data = torch.randn(8, 3)
    results = []
    for accumulate in (1, 4):
        net = torch.nn.Linear(3, 1)
        torch.nn.init.constant_(net.weight, 0.1)
        torch.nn.init.zeros_(net.bias)
        chunks = iter(list(data.chunk(accumulate)) * 5)
        train(
            "toy",
            parameters=net.parameters(),
            loss_fn=lambda g, n=net, c=chunks: ((n(next(c)) - 1).square().mean(), {}),
            config=LoopConfig(steps=5, batch_size=8, accumulate=accumulate, learning_rate=1e-2),
            state={"net": net},
            key="k",
            checkpoints=CheckpointStore(tmp_path / str(accumulate)),
            metrics=lambda m, s: None,
            accelerator=make_accelerator(CONFIG),
        )
        results.append(net.weight.detach().clone())
    assert torch.allclose(*results, atol=1e-6)


def test_learning_rate_shape():
    assert learning_rate_at(0, CONFIG) == pytest.approx(1e-2 / 3)
    assert learning_rate_at(2, CONFIG) == pytest.approx(1e-2)
    assert learning_rate_at(12, CONFIG) == pytest.approx(2e-4)
    assert learning_rate_at(500, LoopConfig(steps=9, batch_size=1, learning_rate=1.0)) == 1.0


def test_ema_by_hand():
    target, source = [torch.tensor([1.0])], [torch.tensor([3.0])]
    ema_update(target, source, 0.9)
    assert target[0].item() == pytest.approx(1.2)


def test_checkpoints_rotate_and_survive_damage(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.save(step, "k", {"x": torch.tensor(step)})
    second, third = sorted((tmp_path / "k").glob("step-*"))
    assert (second.name[:13], third.name[:13]) == ("step-00000002", "step-00000003")
    third.write_bytes(b"cut off")
    assert store.load("k")[0] == 2
    second.write_bytes(b"")
    with pytest.raises(UserError, match="none of its 2 checkpoints can be read; delete the folder"):
        store.load("k")


def test_checkpoint_with_code_inside_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    tmp_path.joinpath("c", "k").mkdir(parents=True)
    torch.save({"step": 1, "key": "k", "state": Evil()}, tmp_path / "c" / "k" / "step-00000001.pt")
    with pytest.raises(UserError):
        CheckpointStore(tmp_path / "c").load("k")
    assert not (tmp_path / "owned").exists()


def test_each_optimiser_trains_and_the_missing_one_says_what_to_install():
    for name in ("adamw", "adafactor"):
        parameter = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = make_optimizer([parameter], LoopConfig(steps=1, batch_size=1, learning_rate=0.1, optimizer=name))
        parameter.sum().backward()
        optimizer.step()
        assert (parameter < 1).all(), name
    with pytest.raises(ValueError, match="adamw_8bit needs bitsandbytes: pip install bitsandbytes, or use adafactor"):
        LoopConfig(steps=1, batch_size=1, learning_rate=0.1, optimizer="adamw_8bit")
