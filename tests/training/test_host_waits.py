"""How often the CPU reads a tensor within an update, or sends one in a way that waits. On a GPU both wait for all that is queued.

Reads are counted on a CPU, with the fused optimisers that a GPU has. There a fused step is left out by the device where gradients are not
finite. What is sent is counted on PyTorch's device without values ("meta"), in whose place a GPU would be.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import stages
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.recipes.distil import make_adapters
from hypersd_pipeline.rewards.loading import load_reward
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import LoopConfig, Steps, make_accelerator, make_optimizer, train
from hypersd_pipeline.training.stage import build_stage

CONSISTENCY = {"segments": 2, "guidance": (3.0, 5.0)}
JUDGE = {
    "weight": 0.5,
    "hidden": 32,
    "real": "data",
    "levels": 2,
    "norm": "none",
    "loss": "relativistic",
    "renoise": True,
    "listen_above": 0.4,
}
REWARD = {"kind": "reward", "reward": {"kind": "shipped_quality"}, "alpha": 100.0, "weight": 0.1}
MATCHING = {"guidance": (3.0, 3.0), "critic": {"updates": 2}}
READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.masked_select}


class Reads(TorchDispatchMode):
    """Counts reads of a tensor's values by the CPU, and of them those of answers (bool)."""

    def __init__(self):
        super().__init__()
        self.count = self.answers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in READS:
            self.count += 1
            self.answers += args[0].dtype == torch.bool
        return func(*args, **(kwargs or {}))


class Words(stages.Rows):
    """Their captions are not looked up by numbers, which lie on the CPU."""

    def captions(self, indices, generator=None):
        return ["a cat"] * len(indices)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("waits"))))


def reads(teacher, folder, terms, steps, **more):
    """How often a training of ``steps`` updates reads a tensor. Only its last update is logged and saved."""
    loop = {**stages.LOOP, "steps": steps, "accumulate": 2, "log_every": 100, "checkpoint_every": 100}
    config = StageConfig(terms=terms, lora=stages.LORA, loop=loop, **more)
    model = load_teacher(teacher, parts=("backbone", "vae"), device="cpu")
    adapters = make_adapters(model, config)
    student, ema = adapters.parameters("student"), adapters.parameters("ema")
    context = stages.context(
        adapters,
        Words(*vars(stages.rows()).values()),
        batch=2,
        passes=2,
        pairs=stages.pairs(),
        decode=lambda x: model.decode(x, clip=False),
        segments=2,
    )
    stage = build_stage(config, context, ready=lambda: adapters.use("student"))
    with Reads() as found:
        train(
            "waits", parameters=student, loss_fn=stage, config=config.loop, state={"adapters": adapters, **stage.state()}, key="k",
            checkpoints=CheckpointStore(folder), metrics=lambda values, step: None, accelerator=make_accelerator(config.loop),
            after_update=lambda: ema_update(ema, student, 0.95), companions=stage.companions(), watch=stage.watch,
        )  # fmt: skip
    return found


KINDS = pytest.mark.parametrize(
    ("name", "terms", "more", "allowed"),
    [
        ("tscd", {"consistency": CONSISTENCY}, {}, 0),
        ("hybrid", {"consistency": CONSISTENCY, "adversarial": JUDGE}, {}, 0),
        ("progressive", {"consistency": {**CONSISTENCY, "target": "solver", "solver_points": 4}}, {}, 2),  # drawn on the CPU, of each pass
        ("feedback", {"quality": REWARD, "anchor": {"weight": 1.0}}, {}, 0),
        (
            "feedback at one of two steps",
            {"quality": REWARD},
            {"sample": {"steps": 2, "gradient_steps": 2}},
            2,
        ),  # the step, drawn on the CPU
        ("dmd", {"matching": MATCHING, "regression": {}, "consistency": CONSISTENCY}, {}, 0),
    ],
)


@KINDS
def test_an_update_reads_nothing_back(teacher, tmp_path, monkeypatch, name, terms, more, allowed):
    monkeypatch.setattr("hypersd_pipeline.training.loop.can_fuse", lambda parameters: True)
    few, many = (reads(teacher, tmp_path / str(steps), terms, steps, **more) for steps in (1, 3))
    assert many.count - few.count == 2 * allowed


class Sends(TorchDispatchMode):
    """Counts copies from the CPU to the device for which the CPU waits."""

    def __init__(self):
        super().__init__()
        self.sent = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func._overloadpacket
        if name is torch.ops.aten._to_copy and args[0].device.type == "cpu" and output.device.type == "meta":
            self.sent += 1
            self.waits += not kwargs.get("non_blocking", False)
        elif name is torch.ops.aten.copy_ and args[0].device.type == "meta" and args[1].device.type == "cpu":
            self.waits += 1
        return output


def pinned(x):
    """As ``Tensor.pin_memory`` does it: the same strides, filled by a copy. A build of PyTorch without a GPU has no such memory."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage().clone(), 0, x.shape, x.stride()).copy_(x)


@KINDS
def test_nothing_is_sent_in_a_way_that_waits(teacher, monkeypatch, name, terms, more, allowed):
    """The second pass of a stage on the device, after tables that are sent once. It could not read a value there: that is an error."""
    monkeypatch.setattr("hypersd_pipeline.conditioning.UNWAITED", {"meta"})
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # the device has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr("hypersd_pipeline.training.terms.reward.load_reward", lambda reward, device: load_reward(reward, "cpu").to(device))
    config = StageConfig(terms=terms, lora=stages.LORA, loop=stages.LOOP, **more)
    model = load_teacher(teacher, parts=("backbone", "vae"), device="cpu")
    adapters = make_adapters(model, config)
    model.backbone.module.to("meta")
    model.vae.to("meta")
    model.device = torch.device("meta")
    rows = Words(*vars(stages.rows()).values())
    context = replace(
        stages.context(adapters, rows, batch=2, pairs=stages.pairs(), decode=lambda x: model.decode(x, clip=False), segments=2),
        device=model.device,
    )
    stage = build_stage(config, context, ready=lambda: adapters.use("student"))
    for matching in (term for _, listed in stage.parts for _, term in listed if hasattr(term, "critic")):
        monkeypatch.setattr(matching.critic.steps, "take", lambda finite: True)
    for _ in range(2):
        with Sends() as found:
            stage(stages.generator())[0].backward()
    assert found.sent > 1 and found.waits == 0


def test_without_fused_optimisers_an_update_waits_once_for_each_decision(teacher, tmp_path):
    """Are all gradients finite? Asked once for the student, and once for each update of the critic."""
    terms = {"matching": MATCHING}
    few, many = (reads(teacher, tmp_path / str(steps), terms, steps) for steps in (1, 3))
    assert many.answers - few.answers == 2 * 3  # Adam reads its own counts besides, which lie on the CPU


def test_the_device_leaves_out_what_is_not_finite(monkeypatch):
    """Weights, moments and counts are those of the optimiser for which the CPU decides, up to the rounding of the fused one."""
    found = []
    for fused in (False, True):
        monkeypatch.setattr("hypersd_pipeline.training.loop.can_fuse", lambda parameters, fused=fused: fused)
        weight = torch.nn.Parameter(torch.ones(5))
        steps = Steps([make_optimizer([weight], LoopConfig(steps=1, batch_size=1, learning_rate=0.1))])
        counts = []
        for gradient in (1.0, float("nan"), 2.0, float("inf"), float("inf")):
            before = weight.detach().clone()
            weight.grad = torch.full((5,), gradient)
            steps.take(torch.isfinite(weight.grad).all())
            assert weight.grad is None and torch.equal(before, weight) == (gradient not in (1.0, 2.0))
            steps.read()
            counts.append((steps.skipped, steps.in_a_row))
        found.append((weight.detach(), counts, steps.waits))
    (one, counts, waits), (other, other_counts, other_waits) = found
    assert counts == other_counts == [(0, 0), (1, 1), (1, 0), (2, 1), (3, 2)]
    assert waits and not other_waits and torch.allclose(one, other, atol=1e-6)


def test_a_training_whose_device_decides_goes_back_too(tmp_path, monkeypatch, caplog):
    """Three updates in a row are not finite. With fused optimisers that is noticed where values are logged."""
    monkeypatch.setattr("hypersd_pipeline.training.loop.can_fuse", lambda parameters: True)
    weight, calls = torch.nn.Parameter(torch.ones(3)), []
    config = LoopConfig(steps=8, batch_size=1, learning_rate=0.01, log_every=2, checkpoint_every=2, max_bad_steps=3)

    def loss(generator):
        calls.append(1)
        return weight.square().sum() * (float("nan") if 3 <= len(calls) <= 6 else 1.0), {}

    report = train(
        "toy", parameters=[weight], loss_fn=loss, config=config, state={}, key="k", checkpoints=CheckpointStore(tmp_path),
        metrics=lambda values, step: None, accelerator=make_accelerator(config),
    )  # fmt: skip
    assert (report["total_skipped_steps"], report["total_rollbacks"]) == (4, 1) and torch.isfinite(weight).all()
    assert "toy: a non-finite loss or gradient (main)" in caplog.text and "back to the checkpoint of step 2" in caplog.text
