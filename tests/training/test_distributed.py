"""Several processes make the updates that one makes, up to the order in which numbers are added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stages
import tiny
import torch
from ranks import on_ranks

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.recipes.stage import shared
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.ema import ema_update
from hypersd_pipeline.training.loop import make_accelerator, train
from hypersd_pipeline.training.stage import build_stage, needs

TSCD = {
    "consistency": {"segments": 4, "guidance": (3.0, 5.0)},
    "adversarial": {"weight": 0.3, "renoise": True, "encoder": "adapter", "balance": False},
}
FEEDBACK = {"reward": {"reward": {"kind": "shipped_quality"}, "alpha": 10.0}, "anchor": {"weight": 2.0}}
DMD = {
    "consistency": {"segments": 1, "guidance": (3.0, 5.0), "batch": 4},
    "matching": {"guidance": (2.0, 4.0), "batch": 4, "critic": {"updates": 2, "learning_rate": 1e-2, "warmup_updates": 2}},
    "regression": {},
    "adversarial": {"weight": 0.2, "pair": False, "listen_above": 0.5},
}
METHODS = {"tscd": (TSCD, {}), "feedback": (FEEDBACK, {"steps": 4, "gradient_steps": 3}), "dmd": (DMD, {})}
WAYS = {"tscd": [(2, 1), (4, 1), (2, 2)], "feedback": [(2, 1), (4, 1), (1, 4)], "dmd": [(2, 1), (4, 1)]}
"""Ranks and passes. The critic and the balance see one pass at a time, so that passes are not the same for them."""


def config_of(method: str, **loop: Any) -> StageConfig:
    terms, sample = METHODS[method]
    values = {"steps": 3, "batch_size": 8, "learning_rate": 0.01, "log_every": 1, "checkpoint_every": 2}
    return StageConfig(terms=terms, sample=sample, lora=stages.LORA, loop={**values, **loop})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    config = TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("teacher"))))
    return load_teacher(config, parts=("backbone", "vae"))


def trained(model: Teacher, config: StageConfig, folder: Path, stop_after: int | None = None) -> dict[str, Any]:
    """Train a stage on this rank: its start, its weights at the end, and what it logged."""
    more = needs(config)
    adapters = AdaptedBackbone(
        model.backbone, model.process, **stages.LORA, trainable=("student", *more["trainable"]), fresh_names=more["fresh_names"],
        encoder_names=more["encoder_names"],
    )  # fmt: skip
    stages.moved(adapters, "student", "ema")
    student, average = adapters.parameters("student"), adapters.parameters("ema")
    start, logged = [p.detach().clone() for p in student], []
    loop = config.loop
    context = stages.context(
        adapters, stages.rows(), batch=distributed.share("batch_size", loop.batch_size // loop.accumulate), passes=loop.accumulate,
        decode=lambda x: model.decode(x, clip=False), pairs=stages.pairs(), segments=4,
    )  # fmt: skip
    stage = build_stage(shared(config), context)
    train(
        "stage", parameters=student, loss_fn=stage, config=loop, state={"adapters": adapters, **stage.state()}, key="key",
        checkpoints=CheckpointStore(folder), metrics=lambda values, step: logged.append({"step": step, **values}),
        accelerator=make_accelerator(loop), after_update=lambda: ema_update(average, student, 0.9), companions=stage.companions(),
        finished=lambda step: step == stop_after,
    )  # fmt: skip
    everything = [p.detach().clone() for name in adapters.names for p in adapters.parameters(name)]
    head = [p.detach().clone() for p in stage.adversary.head.parameters()] if stage.adversary else []
    return {"start": start, "student": [p.detach().clone() for p in student], "all": [*everything, *head], "logged": logged}


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Between all weights at the end, in parts of the way that the student went."""
    way = (flat(wanted["student"]) - flat(wanted["start"])).norm()
    return float((flat(found["all"]) - flat(wanted["all"])).norm() / way)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_and_passes_make_the_updates_of_one(teacher, tmp_path, method):
    def run(ranks, passes=1, name=None, **more):
        config, folder = config_of(method, accumulate=passes, **more.pop("loop", {})), tmp_path / (name or f"{ranks}-{passes}")
        return on_ranks(ranks, tmp_path / f"group-{folder.name}-{ranks}", lambda: trained(teacher, config, folder, **more))

    (wanted,) = run(1)
    for ranks, passes in WAYS[method]:
        results = run(ranks, passes)
        for other in results[1:]:
            assert torch.equal(flat(other["all"]), flat(results[0]["all"]))  # the ranks stay together, bit for bit
            assert other["logged"] == []  # the first one logs
        assert difference(results[0], wanted) < 0.02  # Adam makes much of the last bits of a small gradient
        first, same = results[0]["logged"][0], wanted["logged"][0]
        assert first["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-3)
        if passes == 1:
            for name in set(same) - {"images_per_second", "discriminator_unbeaten_steps", "matching"}:  # a root of a mean
                assert first[name] == pytest.approx(same[name], rel=1e-3, abs=1e-5), name
    if method == "tscd":
        run(2, name="parts", stop_after=2)
        resumed = run(4, name="parts")[0]
        assert [line["step"] for line in resumed["logged"]] == [3] and difference(resumed, wanted) < 0.02
        assert difference(run(1, name="seed", loop={"seed": 1})[0], wanted) > 0.2  # what another batch would make


def test_unequal_parts_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "ranks", lambda: 3)
    with pytest.raises(UserError, match=r"^stage.terms.consistency.batch: 4 samples of a pass cannot be shared by 3 processes; use a mult"):
        shared(config_of("dmd", batch_size=9))


def test_a_refusal_of_the_first_rank_reaches_all_and_gradients_may_be_sent_as_bf16(tmp_path):
    def call():
        def refuse():
            raise UserError(f"rank {distributed.rank()}: the stage is locked; wait.")

        told = ""
        try:
            distributed.of_first(refuse)
        except UserError as error:
            told = str(error)
        weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        weights[0].grad = torch.tensor([1.0, 1.001]) * (1 + 2 * distributed.rank())
        distributed.send_gradients_as(torch.bfloat16)
        distributed.average_gradients(weights)
        return {"told": told, "grads": [w.grad for w in weights], "stop": distributed.anywhere(distributed.rank() == 1)}

    for result in on_ranks(2, tmp_path, call):
        assert result["told"] == "rank 0: the stage is locked; wait." and result["stop"] is True
        assert [grad.tolist() for grad in result["grads"]] == [[2.0, 2.0], [0.0, 0.0]]  # 1.001 is 1 in bf16
