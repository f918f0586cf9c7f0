"""Pairs of noise and what it leads to: whose walks they are, that they are made once, and that others are refused."""

import functools

import pytest
import tiny
import torch
from ranks import on_ranks
from worlds import prepare

from hypersd_pipeline.data import trajectories
from hypersd_pipeline.data.trajectories import (
    FILE,
    NoisePairsConfig,
    make_noise_pairs,
    noise_pairs_key,
    read_noise_pairs,
    walk_noise_pairs,
)
from hypersd_pipeline.diffusion.grids import trailing_timesteps
from hypersd_pipeline.diffusion.sampling import sample_ddim
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.lora import merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.training import distributed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher and its cache."""
    folder = tmp_path_factory.mktemp("pairs")
    teacher = TeacherConfig(source=str(tiny.write_sd15(folder)))
    return teacher, prepare(folder, teacher)


@pytest.fixture(scope="module")
def start(world):
    """The LoRA of a distilled model."""
    model = load_teacher(world[0], parts=("backbone",))
    adapters = AdaptedBackbone(model.backbone, model.process, rank=2, target_modules=("to_q", "conv1"), names=("x",), trainable=())
    for parameter in adapters.parameters("x"):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return adapters.export("x", {})


def pairs_config(**changes):
    return NoisePairsConfig(**{"count": 6, "batch_size": 4, **changes})


def made(world, folder, config, start=None, mine=distributed.mine):
    """The pairs as the training reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = folder.parent / "parts"
    walk = functools.partial(walk_noise_pairs, world[1], world[0], config, start, parts, mine)
    make_noise_pairs(world[1], world[0], config, start, parts, walk)(folder)
    assert not parts.exists()
    return read_noise_pairs(folder, key_of(world, config, start))


def key_of(world, config, start=None):
    return noise_pairs_key(config, world[1], load_teacher(world[0], parts=("backbone",)), start)


def test_the_teachers_pairs_are_its_guided_walks(world, start, tmp_path):
    pairs = made(world, tmp_path, pairs_config(source="teacher", steps=5, guidance_scale=4.0), start)
    data, denoiser = world[1].split("train"), load_teacher(world[0], parts=("backbone",)).denoiser()
    assert pairs.noise.shape == pairs.target.shape == (6, 4, 8, 8) and pairs.noise.std().item() == pytest.approx(1, abs=0.1)
    guided = denoiser.guided(data.unconditional(6), 4.0)
    expected = sample_ddim(guided, pairs.noise, data.conditioning(pairs.rows), trailing_timesteps(5))
    torch.testing.assert_close(pairs.target, expected, rtol=1e-4, atol=1e-4)


def test_distilled_pairs_are_the_merged_students_walks(world, start, tmp_path):
    pairs = made(world, tmp_path, pairs_config(source="distilled", steps=4), start)
    cond = world[1].split("train").conditioning(pairs.rows)
    student, teacher = (load_teacher(world[0], parts=("backbone",)) for _ in range(2))
    merge_lora(student.backbone.module, start)
    expected, teachers = (sample_ddim(m.denoiser(), pairs.noise, cond, trailing_timesteps(4)) for m in (student, teacher))
    torch.testing.assert_close(pairs.target, expected, rtol=1e-4, atol=1e-4)
    assert (pairs.target - teachers).abs().max() > 1e-2


def test_pairs_are_made_once(world, tmp_path):
    first = made(world, tmp_path, pairs_config())
    stamp = (tmp_path / FILE).stat().st_mtime_ns
    again = made(world, tmp_path, pairs_config(batch_size=2))  # the batch size is no part of what they are
    assert (tmp_path / FILE).stat().st_mtime_ns == stamp and torch.equal(first.target, again.target)
    other = made(world, tmp_path, pairs_config(seed=1))
    assert not torch.equal(first.noise, other.noise) and not torch.equal(first.target, other.target)


def test_several_processes_walk_the_pairs_of_one_and_an_interrupted_walk_goes_on(world, start, tmp_path, monkeypatch):
    config, parts = pairs_config(count=7, batch_size=2), tmp_path / "parts"

    def walk():
        walk_noise_pairs(world[1], world[0], config, start, parts, distributed.mine)
        distributed.wait()
        return sorted(path.name for path in parts.iterdir())

    (alone,) = on_ranks(1, tmp_path / "one", lambda: made(world, tmp_path / "alone" / "pairs", config, start).target)
    two, other = on_ranks(2, tmp_path / "two", walk)
    assert two == other and len(two) == 4
    untouched = {name: (parts / name).stat().st_mtime_ns for name in two[1:]}
    (parts / two[0]).unlink()  # as an interruption would have it
    walk()
    assert untouched == {name: (parts / name).stat().st_mtime_ns for name in two[1:]}
    monkeypatch.setattr(trajectories, "sample_ddim", pytest.fail)
    together = made(world, tmp_path / "together", config, start)
    assert torch.equal(together.target[2:], alone[2:]) and torch.allclose(together.target, alone, atol=1e-5)


def test_the_same_pairs_of_another_stage_are_copied(world, tmp_path, monkeypatch):
    walked = []
    monkeypatch.setattr(trajectories, "sample_ddim", lambda *args, **more: walked.append(1) or sample_ddim(*args, **more))
    first = made(world, tmp_path / "pairs_dmd", pairs_config())
    calls = len(walked)
    same_ones = made(world, tmp_path / "pairs_one_step_unet", pairs_config())
    assert calls and len(walked) == calls and torch.equal(first.target, same_ones.target)
    made(world, tmp_path / "pairs_third", pairs_config(seed=1))
    assert len(walked) > calls and [p.name for p in (tmp_path / "pairs_one_step_unet").iterdir()] == [FILE]


def test_pairs_of_something_else_or_none_are_refused(world, start, tmp_path):
    with pytest.raises(UserError, match=r"pairs\.safetensors is missing"):
        read_noise_pairs(tmp_path, "any")
    made(world, tmp_path, pairs_config())
    for config, lora in ((pairs_config(seed=1), None), (pairs_config(), start)):
        with pytest.raises(UserError, match="made with another model or other settings"):
            read_noise_pairs(tmp_path, key_of(world, config, lora))


def test_no_pairs_are_made_where_none_are_needed(world, tmp_path):
    make_noise_pairs(world[1], world[0], None, None, tmp_path / "parts", walk=pytest.fail)(tmp_path)
    assert list(tmp_path.iterdir()) == []
