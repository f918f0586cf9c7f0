"""Batches that a thread draws while a pass is computed: the same draws, whoever makes them, and one pass ahead at most."""

import threading

import pytest
import stages
import tiny
import torch

from hypersd_pipeline.draws import Draws, randint, randn
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.recipes.distil import make_adapters
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.loop import TrainingStopped, make_accelerator, train
from hypersd_pipeline.training.stage import build_stage

CONSISTENCY = {"segments": 2, "guidance": (3.0, 5.0)}
MATCHING = {"guidance": (3.0, 3.0), "critic": {"updates": 1, "warmup_updates": 2}}
DRAWS_LATER = {"matching": MATCHING, "consistency": CONSISTENCY}
"""Their terms draw too, after the batch."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("ahead"))))


class Drawing(stages.Rows):
    """Rows whose latents are drawn. It remembers which threads read, and may break or stop the training at a read."""

    def __init__(self, at_read=lambda number: None):
        super().__init__(*vars(stages.rows()).values())
        self.threads, self.at_read = [], at_read

    def sample(self, indices, generator):
        self.threads.append(threading.current_thread() is threading.main_thread())
        self.at_read(len(self.threads))
        return self.latents[indices] + randn((len(indices), *self.latent_shape), generator)


def trained(teacher, folder, terms, accumulate, ahead, data=None, steps=4, watch=lambda values, step: None):
    """The student's weights, and whether the main thread made each read."""
    loop = {**stages.LOOP, "steps": steps, "accumulate": accumulate, "log_every": 1, "checkpoint_every": 100}
    config = StageConfig(terms=terms, lora=stages.LORA, loop=loop)
    adapters, data = make_adapters(load_teacher(teacher, parts=("backbone",), device="cpu"), config), data or Drawing()
    stages.moved(adapters, "student")
    stage = build_stage(config, stages.context(adapters, data, batch=4 // accumulate, passes=accumulate), lambda: adapters.use("student"))

    def run():
        train(
            "ahead", parameters=adapters.parameters("student"), loss_fn=stage, config=config.loop,
            state={"adapters": adapters, **stage.state()}, key="k", checkpoints=CheckpointStore(folder),
            metrics=lambda values, step: watch(values, step), accelerator=make_accelerator(config.loop), companions=stage.companions(),
        )  # fmt: skip

    if ahead:
        with stage.drawing_ahead(torch.device("cpu")):
            run()
    else:
        run()
    return [p.detach().clone() for p in adapters.parameters("student")], data.threads


@pytest.mark.parametrize(
    ("terms", "accumulate", "by_main"),
    [
        ({"consistency": CONSISTENCY}, 1, 1),  # the first batch only
        ({"consistency": CONSISTENCY}, 2, 1),
        (DRAWS_LATER, 2, 1),  # with several passes, terms draw in the first one, and the next update's batch comes after the last
        (DRAWS_LATER, 1, 4),  # every batch: what was drawn ahead is not what follows the terms' draws
    ],
)
def test_a_training_is_the_same_bit_for_bit(teacher, tmp_path, terms, accumulate, by_main):
    plain, threads = trained(teacher, tmp_path / "plain", terms, accumulate, ahead=False)
    assert all(threads)
    ahead, threads = trained(teacher, tmp_path / "ahead", terms, accumulate, ahead=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, ahead, strict=True))
    assert sum(threads) == by_main and not all(threads)


def test_it_stays_one_pass_ahead_and_gives_up_where_it_never_helps(teacher, tmp_path):
    _, threads = trained(teacher, tmp_path / "a", {"consistency": CONSISTENCY}, 1, ahead=True, steps=6)
    assert len(threads) == 6 + 1  # the last one is for an update that does not come
    later = {"matching": {**MATCHING, "critic": {"updates": 1}}, "consistency": CONSISTENCY}
    _, threads = trained(teacher, tmp_path / "b", later, 1, ahead=True, steps=6)
    assert threads.count(False) == 2 and threads.count(True) == 6


def test_a_stopped_training_goes_on_bit_for_bit(teacher, tmp_path):
    """The checkpoint has the generator as it is before the batch that lies ready."""
    import os
    import signal

    def stop(values, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    terms = {"consistency": CONSISTENCY}
    whole, _ = trained(teacher, tmp_path / "whole", terms, 1, ahead=False)
    with pytest.raises(TrainingStopped):
        trained(teacher, tmp_path / "parts", terms, 1, ahead=True, watch=stop)
    again, _ = trained(teacher, tmp_path / "parts", terms, 1, ahead=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_an_error_of_the_thread_is_the_trainings(teacher, tmp_path):
    def broken(number):
        if number == 3:
            raise UserError("shard 7 is damaged; run data_prep again.")

    with pytest.raises(UserError, match="shard 7 is damaged"):
        trained(teacher, tmp_path, {"consistency": CONSISTENCY}, 1, ahead=True, data=Drawing(broken))


def test_a_generator_follows_only_what_it_would_have_drawn():
    def draw(generator):
        return [randn((2, 3), generator), randint(0, 10, (2,), generator)]

    for passes in (1, 3):
        one, other = Draws(), Draws()
        for generator in (one, other):
            generator.manual_seed(5)
            generator.take(0, passes)
            draw(generator)
        for part in (*range(1, passes), 0):
            ahead = one.following()
            drawn = draw(ahead)
            for generator in (one, other):
                generator.take(part, passes)
            assert one.catch_up(ahead) and all(torch.equal(a, b) for a, b in zip(drawn, draw(other), strict=True))
            assert torch.equal(one.get_state(), other.get_state())
    one = Draws()
    ahead = one.following()
    draw(ahead)
    randn((2,), one)  # something else
    state = one.get_state()
    assert not one.catch_up(ahead) and torch.equal(one.get_state(), state)
