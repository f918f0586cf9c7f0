"""How the student comes to its prediction: what is drawn, in which order, and where the walk ends."""

import pytest
import stages
import torch
from stages import generator

from hypersd_pipeline.training.rollouts import NoisedImages, SampleConfig, Samples, Trajectory, gradient_step
from hypersd_pipeline.training.terms import ConsistencyConfig, PerceptualConfig

PROCESS = stages.process()


def networks(seen=None):
    """Networks ``eps = a x`` that say who was called, at which time, and whether with a graph."""

    def named(name, slope):
        def call(x, t, cond):
            if seen is not None:
                seen.append((name, t.tolist(), torch.is_grad_enabled()))
            return slope * x

        return call

    slopes = {"base": 0.6, "previous": 0.5, "ema": 0.4, "student": 0.3}
    return stages.Networks(PROCESS, **{name: named(name, slope) for name, slope in slopes.items()})


def samples(config=None, seen=None, **more):
    wanted = {"unconditional": False, "prompts": False, "real": False, "anchor": False}
    given = {name: more.pop(name) for name in wanted if name in more}
    context = stages.context(networks(seen), stages.rows(), batch=3, **more)
    return Samples(SampleConfig(**(config or {})), context, **{**wanted, **given})


@pytest.mark.parametrize(
    ("count", "gradient_steps", "after", "expected"),
    [(4, 1, -1, {3}), (4, 2, -1, {2, 3}), (4, 9, -1, {0, 1, 2, 3}), (4, 2, 2, {3}), (4, 2, 3, {3}), (4, 4, 1, {2, 3}), (1, 2, 0, {0})],
)
def test_the_step_with_gradient_is_one_of_the_last(count, gradient_steps, after, expected):
    assert {gradient_step(count, gradient_steps, generator(seed), after) for seed in range(40)} == expected


def test_nothing_is_drawn_where_there_is_no_choice():
    g = generator()
    before = g.get_state()
    gradient_step(1, 1, g)
    gradient_step(4, 1, g)
    assert torch.equal(g.get_state(), before)


def test_a_sample_in_one_step_by_hand():
    seen = []
    rollout, g = samples(seen=seen), generator(7)
    batch = rollout.draw(g)
    data, draws = rollout.context.data, generator(7)
    rows = torch.randint(8, (3,), generator=draws)
    assert torch.equal(batch.z, torch.randn(3, 4, 8, 8, generator=draws))
    assert torch.equal(batch.cond.prompt_embeds, data.cond.prompt_embeds[rows])
    assert (batch.uncond, batch.target, batch.real, list(batch.prompts)) == (None, None, None, [])  # what nobody needs is not made
    prediction = rollout.predict(batch, g)
    alpha, sigma = PROCESS.alphas[999], PROCESS.sigmas[999]
    torch.testing.assert_close(prediction.sample, ((1 - sigma * 0.3) / alpha * batch.z).float())
    assert seen == [("student", [999] * 3, True)] and prediction.t.tolist() == [999] * 3 and prediction.s.tolist() == [0] * 3
    assert torch.equal(prediction.x_t, batch.z) and prediction.anchor is None


def test_a_sample_in_few_steps_walks_without_a_graph():
    seen = []
    rollout = samples({"steps": 4, "gradient_steps": 1}, seen, anchor=True)
    prediction = rollout.predict(rollout.draw(generator()), generator())
    walk = [("student", [t] * 3, False) for t in (999, 749, 499)]
    assert seen == [*walk, ("base", [249] * 3, False), ("student", [249] * 3, True)]  # the student last
    torch.testing.assert_close(prediction.anchor, rollout.context.base.clean(prediction.x_t, 249, prediction.cond))


def test_terms_get_what_they_need_of_the_same_rows():
    rollout = samples(unconditional=True, prompts=True, real=True)
    batch, rows = rollout.draw(generator(7)), torch.randint(8, (3,), generator=generator(7))
    assert batch.prompts == [f"caption {int(i)}" for i in rows] and torch.equal(batch.real, rollout.context.data.latents[rows])
    assert len(batch.uncond) == 3
    prediction = rollout.predict(batch, generator())
    assert prediction.real is batch.real and prediction.prompts is batch.prompts and prediction.uncond is batch.uncond


def test_stored_pairs_bring_their_noise_and_rows():
    pairs = stages.pairs(5)
    rollout = samples(pairs=pairs, prompts=True)
    batch, picks = rollout.draw(generator(7)), torch.randint(5, (3,), generator=generator(7))
    assert torch.equal(batch.z, pairs.noise[picks]) and torch.equal(batch.target, pairs.target[picks])
    assert batch.prompts == [f"caption {int(i)}" for i in pairs.rows[picks]]
    assert rollout.predict(batch, generator()).target is batch.target


@pytest.mark.parametrize(
    ("more", "order"),
    [
        ({}, ["base", "ema", "student"]),
        ({"target": "student"}, ["base", "student", "student"]),
        ({"teacher": "previous_stage"}, ["previous", "ema", "student"]),
    ],
)
def test_a_trajectory_calls_teacher_target_student(more, order):
    seen = []
    config = ConsistencyConfig(segments=2, guidance=(3.0, 5.0), batch=6, **more)
    rollout = Trajectory(config, stages.context(networks(seen), stages.rows(), batch=3))
    batch = rollout.draw(generator())
    assert seen == [] and len(batch.x_tn) == 6  # its own number of samples
    assert (batch.uncond is None) == (config.teacher == "previous_stage")  # guidance is baked in
    assert bool(((batch.guidance >= 3) & (batch.guidance <= 5)).all()) and batch.guidance.std() > 0
    prediction = rollout.predict(batch, generator())
    assert [name for name, _, _ in seen] == order and [grad for _, _, grad in seen] == [False, False, True]
    assert [len(t) for _, t, _ in seen] == [12 if order[0] == "base" else 6, 6, 6]
    assert prediction.real is prediction.target and not prediction.target.requires_grad
    assert torch.equal(prediction.s, batch.times.t_end) and torch.equal(prediction.t, batch.times.t_n)


def test_a_noised_image_comes_from_its_row():
    context = stages.context(networks(), stages.rows(), annotated=stages.Masked(3))
    rollout = NoisedImages(PerceptualConfig(model={"kind": "solo"}, batch=5), SampleConfig(steps=4, gradient_steps=2), context)
    batch, picks = rollout.draw(generator(7)), torch.randint(3, (5,), generator=generator(7))  # only rows with instances
    assert torch.equal(batch.latents, context.data.latents[picks]) and len(batch.instances) == 5
    assert torch.equal(batch.cond.prompt_embeds, context.data.cond.prompt_embeds[picks])
    prediction = rollout.predict(batch, generator(1))
    z = torch.randn(5, 4, 8, 8, generator=generator(1))
    at = torch.full((5,), 499)  # from half of the grid, a step to 249, and clean from there
    student = context.student
    expected = student.jump(PROCESS.add_noise(batch.latents, z, at), at, torch.full_like(at, 249), batch.cond)
    torch.testing.assert_close(prediction.x_t, expected)
    torch.testing.assert_close(prediction.sample, student.clean(expected, 249, batch.cond))
