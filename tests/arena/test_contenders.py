"""Contenders make the images that the evaluation measures, beside each other in one network."""

import threading

import numpy as np
import pytest
from arenas import lora
from tiny import write_teacher

from hypersd_pipeline.arena.config import ArenaConfig, rows
from hypersd_pipeline.arena.contenders import Busy, Sampler, contenders, contenders_of
from hypersd_pipeline.arena.page import MOST_SEED, accepted, accepted_seed
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.sampling import generate
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.grids import to_pil
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

EVALUATION = EvaluationConfig(samples=10, unseen_samples=6)
MODELS = {"teacher": (2,), "one": (1, 3), "two": (2,)}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def config(request, tmp_path_factory):
    return TeacherConfig(source=str(write_teacher(tmp_path_factory.mktemp("teacher"), request.param)))


def loras(teacher):
    """Of other ranks and modules, one with noise between its steps."""
    return {"one": lora(teacher, 2, "conv2", 1), "two": lora(teacher, 3, "conv1", 2, eta=0.3, timestep_spacing="tcd")}


def merged(config, name, contender, prompt, seed):
    """The image as the evaluation makes it: the LoRA merged into a network of its own."""
    teacher = load_teacher(config)
    denoiser = teacher.denoiser()
    if name == "teacher":
        denoiser = denoiser.guided(teacher.unconditional(1), EVALUATION.guidance_scale)
    else:
        merge_lora(teacher.backbone.module, loras(teacher)[name])
    timesteps = contender.contract.timesteps(contender.contract.steps, teacher.process.num_train_timesteps)
    (image,) = generate(
        teacher, teacher.encode_prompts([prompt]), timesteps, seed=seed, batch_size=1, denoiser=denoiser, eta=contender.contract.eta
    )
    return image[0]


def test_images_are_the_evaluation_s_whichever_model_was_used_before(config):
    teacher = load_teacher(config)
    several = contenders(rows(MODELS), teacher, loras(teacher), EVALUATION)
    sampler = Sampler(teacher, loras(teacher), EVALUATION, queue=4)
    sampler.warm_up(several)
    images = {}
    for one in [*several, *reversed(several)]:
        sampler._sample.cache_clear()
        sample = sampler.sample(one, "two cats", 3)
        assert sample.seconds > 0
        found = np.asarray(sample.image).astype(int)
        if one.name not in images:
            images[one.name] = np.asarray(to_pil(merged(config, one.model, one, "two cats", 3))).astype(int)
        assert np.abs(found - images[one.name]).max() <= 2, one.name  # levels of 255: beside the weights is rounded otherwise than merged
    four = images.pop("one_3_steps")
    assert all(np.abs(four - other).max() > 5 for other in images.values())
    assert {name: len(taken) for name, taken in sampler.seconds.items()} == {one.name: 2 for one in several}  # no warm-up among them


def test_a_key_is_of_weights_steps_and_teacher(config):
    teacher = load_teacher(config)
    given = loras(teacher)
    first = contenders(rows(MODELS), teacher, given, EVALUATION)
    assert len({one.key for one in first}) == 4
    assert [one.guidance for one in first] == [3.0, 1.0, 1.0, 1.0] and first[3].contract == Contract(2, 0.3, "tcd")
    arena = ArenaConfig(shown={"one": (1,)}, voted=MODELS)
    assert contenders_of(arena, config, given.__getitem__, EVALUATION) == first  # the page and the score agree
    given["one"] = lora(teacher, 2, "conv2", 9)
    changed = [a.key != b.key for a, b in zip(first, contenders(rows(MODELS), teacher, given, EVALUATION), strict=True)]
    assert changed == [False, True, True, False]


def test_who_comes_when_too_many_wait_is_told(config):
    teacher = load_teacher(config)
    (one,) = contenders([("teacher", 1)], teacher, {}, EVALUATION)
    sampler, taken = Sampler(teacher, {}, EVALUATION, queue=2), []
    with sampler._network:
        threads = [threading.Thread(target=lambda i=i: taken.append(sampler.sample(one, "a fox", i))) for i in range(2)]
        for thread in threads:
            thread.start()
        while sampler._waiting._value:
            pass
        with pytest.raises(Busy):
            sampler.sample(one, "a fox", 3)
    for thread in threads:
        thread.join()
    assert len(taken) == 2 and sampler.sample(one, "a fox", 0) in taken  # there is room again, and an image is made once


def test_a_lora_of_another_network_is_refused(config):
    teacher = load_teacher(config)
    given = lora(teacher, 2, "conv2", 1)
    tensors = {name.replace("conv2", "conv9"): tensor for name, tensor in given.tensors.items()}
    with pytest.raises((UserError, ValueError), match=r"conv9|does not fit"):
        Sampler(teacher, {"one": type(given)(tensors, given.metadata)}, EVALUATION, 1)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  two\n red\tapples ", "two red apples"),
        ("a\u202efox\x00", "afox"),
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("x" * 21, "x" * 21),
        ("x" * 31, None),
        (" \n", None),
        ("\x00", None),
        (None, None),
        (["a fox"], None),
    ],
)
def test_prompts_of_visitors(prompt, expected):
    assert accepted(prompt, 30) == expected


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(0, 0), (7.0, 7), (MOST_SEED, MOST_SEED), (MOST_SEED + 1, None), (-1, None), (1.5, None), (float("nan"), None), (float("inf"), None),
     (True, None), ("1", None), (None, None)],
)  # fmt: skip
def test_seeds_of_visitors(seed, expected):
    assert accepted_seed(seed) == expected


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"shown": {"../k4": [1]}}, "is no model"),
        ({"shown": {"k4": []}}, "one at least"),
        ({"shown": {"k4": [2, 2]}}, "once"),
        ({"shown": {"k4": [51]}}, "50 at most"),
        ({"shown": {"k4": None}}, "every model is left out"),
        ({"voted": {"k4": [1]}}, "between two contenders"),
        ({"prompts": [" "]}, "no prompt"),
        ({"port": 70000}, "65535"),
        ({"host": ""}, "at least 1 character"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(values, told):
    with pytest.raises(ValueError, match=told):
        ArenaConfig(**{"shown": {"k4": [1]}, "voted": {"k4": [1, 2]}, **values})


def test_the_teacher_has_no_more_steps_than_timesteps():
    with pytest.raises(UserError, match=r"arena.voted: 1000 steps are more than the teacher's 200 timesteps"):
        ArenaConfig(shown={"teacher": (4,)}, voted={"teacher": (4, 1000)}).check(200)
    assert ArenaConfig(shown={"teacher": (4,), "k4": None, "k2": (1,)}, voted={"k1": (1, 2)}).loras() == ["k2", "k1"]
