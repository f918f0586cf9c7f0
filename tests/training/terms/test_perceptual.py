"""Feedback: who gets a gradient from which term, and where noised images start and are judged."""

import pytest
import stages
import tiny
import torch
from stages import generator

from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.objectives import feedback
from hypersd_pipeline.perception.config import SmallSoloConfig
from hypersd_pipeline.perception.protocol import LabelMap
from hypersd_pipeline.perception.solo import new_small_solo
from hypersd_pipeline.training.config import FeedbackConfig, StageConfig
from hypersd_pipeline.training.decoding import decoded_one_by_one
from hypersd_pipeline.training.rollouts import NoisedImages, SampleConfig, Samples
from hypersd_pipeline.training.stage import Stage, build_stage
from hypersd_pipeline.training.terms import PerceptualConfig
from hypersd_pipeline.training.terms.anchor import Anchor

STUDENT = "feedback"
FEW = {"steps": 4, "gradient_steps": 2}
QUALITY = {"reward": {"kind": "shipped_quality"}, "alpha": 100.0}
PERCEPTUAL = {"model": {"kind": "solo"}, "batch": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_sd15(tmp_path_factory.mktemp("feedback"))


class Brightness:
    """A perceptual model that can be written out: the mean squared distance of the pixels inside the masks from white."""

    name = "brightness"

    def loss(self, images, instances):
        return torch.stack([(images[i][:, item.masks.any(0)] - 1).square().mean() for i, item in enumerate(instances)]).mean()


def load(folder, perceptual=None, checkpointing=False):
    """Teacher, adapters that are moved, and the context of a stage."""
    model = load_teacher(TeacherConfig(source=str(folder)), parts=("backbone", "vae"))
    adapters = AdaptedBackbone(model.backbone, model.process, **stages.LORA, names=(STUDENT,), trainable=(STUDENT,))
    stages.moved(adapters, STUDENT, seed=2)
    if checkpointing:
        model.backbone.checkpoint_gradients()
    plain = lambda latents: model.decode(latents, clip=False)  # noqa: E731
    decode = (lambda latents: decoded_one_by_one(plain, latents)) if checkpointing else plain
    more = {"decode": decode, "annotated": stages.Masked(8), "perceptual": perceptual}
    return model, adapters, stages.context(adapters, stages.rows(), 2, STUDENT, **more)


def stage_of(context, **terms):
    config = StageConfig(terms=terms, sample=FEW, lora=stages.LORA, loop=stages.LOOP)
    return build_stage(config, context, ready=lambda: context.adapters.use(STUDENT))


def assert_only_the_student_has_a_gradient(model, adapters, *others):
    student = adapters.parameters(STUDENT)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student)
    assert sum(float(p.grad.abs().sum()) for p in student) > 0
    ours = {id(p) for p in student}
    frozen = [*model.backbone.module.parameters(), *model.vae.parameters(), *(p for other in others for p in other.parameters())]
    assert all(p.grad is None for p in frozen if id(p) not in ours)


@pytest.mark.parametrize("term", ["reward", "perceptual", "anchor"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_term_reaches_the_feedback_adapter_and_nothing_else(folder, term, checkpointing):
    model, adapters, context = load(folder, Brightness(), checkpointing)
    if term == "anchor":
        rollout = Samples(SampleConfig(**FEW), context, unconditional=False, prompts=False, real=False, anchor=True)
        stage = Stage([(rollout, [(1.0, Anchor())])], context.decode, lambda: adapters.use(STUDENT))
    else:
        stage = stage_of(context, **{term: QUALITY if term == "reward" else PERCEPTUAL})
    loss, scalars = stage(generator())
    loss.backward()
    assert_only_the_student_has_a_gradient(model, adapters)
    assert set(scalars) == {"reward_shipped_quality" if term == "reward" else term}
    assert all(not value.requires_grad for value in scalars.values())


def test_the_value_is_the_weighed_sum_of_the_terms(folder):
    """Eq. 13 to 15, and the anchor."""
    _, _, context = load(folder, Brightness())
    terms = {"anchor": {"weight": 0.3}, "reward": {**QUALITY, "weight": 0.5}, "perceptual": {**PERCEPTUAL, "weight": 0.7}}
    loss, scalars = stage_of(context, **terms)(generator())
    hinge = 100 - scalars["reward_shipped_quality"]
    assert loss.item() == pytest.approx((0.3 * scalars["anchor"] + 0.5 * hinge + 0.7 * scalars["perceptual"]).item(), rel=1e-4)
    assert scalars["anchor"] > 0 and scalars["perceptual"] > 0


@pytest.mark.parametrize(
    ("steps", "gradient_steps", "perceptual_steps", "expected"),
    [
        (4, 2, None, {(499, 249)}),  # from half of the way, as UniFL, and never from noise without an image
        (4, 2, 3, {(749, 499), (749, 249)}),
        (8, 3, None, {(499, 374), (499, 249), (499, 124)}),
        (4, 2, 1, {(249, 249)}),
        (1, 1, None, {(999, 999)}),
    ],
)
def test_where_a_noised_image_starts_and_is_judged(monkeypatch, steps, gradient_steps, perceptual_steps, expected):
    """The gradient's step is later than the start, where there is a later one, and one of the last."""
    process, told = stages.process(), []
    networks = stages.Networks(process, base=lambda x, t, cond: x, student=lambda x, t, cond: told.append(int(t[0])) or 0.5 * x)
    context = stages.context(networks, stages.rows(), annotated=stages.Masked(8))
    config = PerceptualConfig(**PERCEPTUAL, steps=perceptual_steps)
    rollout = NoisedImages(config, SampleConfig(steps=steps, gradient_steps=gradient_steps), context)
    starts, ends, judged = [], [], []
    noised = process.add_noise
    monkeypatch.setattr(process, "add_noise", lambda x, z, t: starts.append(int(t[0])) or noised(x, z, t))
    monkeypatch.setattr(feedback, "advance", lambda student, x, timesteps, cond: ends.append(timesteps[-1]) or x)
    for seed in range(12):
        g = generator(seed)
        prediction = rollout.predict(rollout.draw(g), g)
        judged.append(int(prediction.t[0]))
        assert len(prediction.instances) == len(prediction.sample) == 2 and not prediction.s.any()
    assert set(zip(starts, ends, strict=True)) == expected and judged == told == ends


def test_a_start_before_the_grid_is_refused():
    terms = {"reward": QUALITY, "perceptual": {**PERCEPTUAL, "steps": 5}}
    with pytest.raises(ValueError, match=r"perceptual\.steps is 5, more than the 4 steps of the grid"):
        FeedbackConfig(terms=terms, sample=FEW, lora=stages.LORA, loop=stages.LOOP, **stages.FEEDBACK)


@pytest.mark.parametrize("variant", ["solo", "solov2"])
def test_solos_gradient_reaches_the_feedback_adapter_and_nothing_else(folder, variant):
    """mmdet's own network, of random weights."""
    solo = new_small_solo(SmallSoloConfig(variant=variant, input_size=64, base_channels=8, feat_channels=16), LabelMap(), seed=0)
    model, adapters, context = load(folder, solo)
    loss, scalars = stage_of(context, perceptual=PERCEPTUAL)(generator())
    loss.backward()
    assert scalars["perceptual"] > 0
    assert_only_the_student_has_a_gradient(model, adapters, solo)
