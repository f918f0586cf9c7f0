"""A stage of distillation as a whole: exact resume, carrying weights on, the solver's two teachers, and its refusals."""

import json
from typing import Any

import pytest
import tiny
import torch
from worlds import prepare

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.lora import LoRA, lora_key
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes.distil import distil
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import StageConfig

SHARED = {
    "lora": {"rank": 2, "target_modules": ("to_q", "to_v", "conv1")},
    "loop": {"steps": 4, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "checkpoint_every": 2},
}


def settings(segments: int = 4, loop: Any = None, **more: Any) -> StageConfig:
    """A stage. Keys of the term or, for ``ema_decay``, of the stage."""
    over = {"ema_decay": more.pop("ema_decay")} if "ema_decay" in more else {}
    term = {"segments": segments, "guidance": (3.0, 5.0), **more}
    return StageConfig(**{**SHARED, **over, "terms": {"consistency": term}, "loop": {**SHARED["loop"], **(loop or {})}})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage")
    teacher = TeacherConfig(source=str(tiny.write_sd15(folder)))
    return teacher, prepare(folder, teacher)


def stage(made, path, config=None, previous=None, stream=lambda metrics, step: None):
    teacher, latents = made
    return distil(latents, teacher, config or settings(), Outputs(CheckpointStore(path), stream), previous)


def same(a, b):
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(made, tmp_path):
    whole, _ = stage(made, tmp_path / "whole")

    def dies(metrics, step):
        if step == 3:
            raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError, match="went away"):
        stage(made, tmp_path / "parts", stream=dies)
    steps = []
    resumed, _ = stage(made, tmp_path / "parts", stream=lambda metrics, step: steps.append(step))
    assert steps == [3, 4]
    assert same(whole, resumed)


def test_the_next_stage_starts_from_the_last_and_moves(made, tmp_path):
    first, _ = stage(made, tmp_path / "a", settings(8))
    second, _ = stage(made, tmp_path / "b", settings(4, ema_decay=0.999999), previous=first)
    # the target network has hardly moved from where the stage began: the weights of the stage before
    assert all(torch.allclose(second.tensors[k], first.tensors[k], atol=1e-6) for k in first.tensors)
    moved, _ = stage(made, tmp_path / "c", settings(4), previous=first)
    assert any(not torch.allclose(moved.tensors[k], first.tensors[k], atol=1e-4) for k in first.tensors)
    assert json.loads(moved.metadata["sampling_contract"])["steps"] == 4


def test_another_start_makes_the_checkpoint_stale(made, tmp_path):
    first, _ = stage(made, tmp_path / "a", settings(8))
    other, _ = stage(made, tmp_path / "b", settings(8, loop={"seed": 1}))
    one, _ = stage(made, tmp_path / "shared", previous=first)
    two, _ = stage(made, tmp_path / "shared", previous=other)
    assert not same(one, two)


def test_a_loras_hash_does_not_depend_on_the_number_of_threads():
    """Sums do, in their last bits: a stage resumed on another number of cores would start anew."""
    weights = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    one, other = LoRA({"a": weights}), LoRA({"a": weights + (weights == weights.max()) * 1e-3})
    threads = torch.get_num_threads()
    try:
        keys = []
        for n in (1, 2):
            torch.set_num_threads(n)
            keys.append(lora_key(one))
    finally:
        torch.set_num_threads(threads)
    assert keys[0] == keys[1] != lora_key(other) and lora_key(None) is None


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_a_stage_trains_on_buckets(tmp_path, layout, monkeypatch):
    """With the adversarial term, whose head is as deep as the smallest bucket allows."""
    from hypersd_pipeline.data.cache import SplitCache

    teacher = TeacherConfig(source=str(tiny.write_teacher(tmp_path, layout)))
    made = teacher, prepare(tmp_path, teacher, buckets={"step": 8}, sizes="image")
    shapes, original = set(), SplitCache.sample
    monkeypatch.setattr(SplitCache, "sample", lambda self, *a: [x := original(self, *a), shapes.add(tuple(x.shape))][0])
    adversarial = {"hidden": 32, "weight": 0.1}
    config = StageConfig(**{**SHARED, "terms": {"consistency": {"segments": 4, "guidance": (3.0, 5.0)}, "adversarial": adversarial}})
    lora, _ = stage(made, tmp_path / "run", config)
    assert len(shapes) > 1 and {shape[0] for shape in shapes} == {4}
    assert all(tensor.isfinite().all() for tensor in lora.tensors.values()) and any(
        tensor.any() for name, tensor in lora.tensors.items() if "lora_B" in name
    )


def test_previous_stage_as_teacher_needs_no_unconditional_half(made, tmp_path, monkeypatch):
    from hypersd_pipeline.data.cache import SplitCache

    first, _ = stage(made, tmp_path / "a", settings(8))
    asked = []
    original = SplitCache.unconditional
    monkeypatch.setattr(SplitCache, "unconditional", lambda self, *a: asked.append(1) or original(self, *a))
    baked, _ = stage(made, tmp_path / "b", settings(4, teacher="previous_stage"), previous=first)
    assert asked == []
    based, _ = stage(made, tmp_path / "c", settings(4), previous=first)
    assert len(asked) == 4  # one for each step
    assert not same(baked, based)


def test_refusals_come_before_any_step(made, tmp_path):
    steps = []

    def stream(metrics, step):
        steps.append(step)

    with pytest.raises(UserError, match="previous_stage needs a stage before"):
        stage(made, tmp_path, settings(8, teacher="previous_stage"), stream=stream)
    with pytest.raises(UserError, match=r"segment boundaries.*use solver_points: 40"):
        stage(made, tmp_path, settings(8, solver_points=50), stream=stream)
    with pytest.raises(UserError, match="needs a consistency term with a weight above 0"):
        off = {"segments": 8, "guidance": (3.0, 5.0), "weight": 0}
        matched = StageConfig(**SHARED, terms={"consistency": off, "regression": {"pairs": {"count": 4}}})
        stage(made, tmp_path, matched, stream=stream)
    other = TeacherConfig(source=str(tiny.write_sd15(tmp_path, seed=1)))
    with pytest.raises(UserError, match="is stale"):
        stage((other, made[1]), tmp_path, stream=stream)
    with pytest.raises(ValueError, match="rising pair"):
        stage(made, tmp_path, settings(8, guidance=(5.0, 2.0)), stream=stream)
    with pytest.raises(ValueError, match=r"guidanc\n.*Extra inputs are not permitted"):
        settings(8, guidanc=(5.0, 2.0))
    with pytest.raises(ValueError, match=r"loop\.step\n.*Extra inputs are not permitted"):
        settings(8, loop={"step": 1})
    assert steps == []
