"""The critic: where it starts, what its updates move, and how they are spread over the passes of an update."""

import pytest
import stages
import tiny
import torch
from stages import generator, sample_batch

from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.lora import merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.training.config import OneStepConfig
from hypersd_pipeline.training.critic import CRITIC, Critic, CriticConfig, pass_plans
from hypersd_pipeline.training.loop import Slowable
from hypersd_pipeline.training.stage import build_stage


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("critic"))))


def load(teacher, start=None):
    model = load_teacher(teacher, parts=("backbone",))
    adapters = AdaptedBackbone(
        model.backbone, model.process, **stages.LORA, trainable=("student", CRITIC), fresh_names=(CRITIC,), start=start
    )  # fmt: skip
    return model, adapters


def build(teacher, passes=1, **settings):
    model, adapters = load(teacher)
    stages.moved(adapters, "student", CRITIC)
    return model, adapters, Critic(adapters, CriticConfig(**settings), passes)


def copies(adapters, name):
    return [p.detach().clone() for p in adapters.parameters(name)]


def same(ones, others):
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_update_moves_the_critic_alone(teacher, requires_grad):
    model, _, critic = build(teacher)
    module = model.backbone.module
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    samples = torch.randn(2, 4, 8, 8, generator=generator(4), requires_grad=requires_grad)
    given = samples * 2 if requires_grad else samples
    loss = critic.update(given, sample_batch().cond, generator())
    assert loss.item() > 0 and not loss.requires_grad and samples.grad is None
    assert all(p.grad is None for p in module.parameters())
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if f".{CRITIC}." in name}


def test_updates_follow_the_denoising_loss(teacher):
    _, _, critic = build(teacher, updates=10, learning_rate=0.02)
    samples, cond = torch.zeros(4, 4, 8, 8), sample_batch(4).cond
    first, *_, last = [critic.update(samples, cond, generator(seed)).item() for seed in (0, 1, 0)]
    assert last < 0.9 * first


@pytest.mark.parametrize("started", [False, True])
def test_the_critic_starts_as_the_base(teacher, started):
    start = None
    if started:
        _, others = load(teacher)
        stages.moved(others, "student")
        start = others.export("student", {})
    _, adapters = load(teacher, start)
    given = sample_batch()
    x, t, cond = given.z, torch.tensor([999, 300]), given.cond
    with torch.no_grad():
        base, critic, student = (adapters.denoiser(name).network(x, t, cond) for name in (None, CRITIC, "student"))
        torch.testing.assert_close(critic, base)
        plain = load_teacher(teacher, parts=("backbone",))
        torch.testing.assert_close(base, plain.backbone(x, t, cond))
        if start is not None:
            merge_lora(plain.backbone.module, start)
            torch.testing.assert_close(student, plain.backbone(x, t, cond), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(student, base, atol=1e-3)


def test_an_update_is_one_step_of_the_optimiser(teacher):
    _, _, critic = build(teacher, updates=3)
    critic.update(sample_batch().z, sample_batch().cond, generator())
    assert {int(entry["step"]) for entry in critic.state_dict()["optimizer"]["state"].values()} == {3}


@pytest.mark.parametrize(
    ("updates", "passes", "draws", "weights", "steps"),
    [
        (5, 1, [5], [1], [1]),
        (2, 4, [1, 1, 1, 1], [1 / 2] * 4, [0, 1, 0, 1]),
        (3, 4, [1, 1, 1, 1], [1 / 2, 1 / 2, 1, 1], [0, 1, 1, 1]),
        (10, 4, [2, 3, 2, 3], [1] * 4, [1] * 4),
        (1, 3, [1, 1, 1], [1 / 3] * 3, [0, 0, 1]),
        (4, 4, [1] * 4, [1] * 4, [1] * 4),
    ],
)
def test_how_updates_are_spread_over_the_passes(updates, passes, draws, weights, steps):
    found = list(pass_plans(updates, passes))
    assert [plan.draws for plan in found] == draws and [plan.steps for plan in found] == [bool(s) for s in steps]
    assert [plan.weight for plan in found] == pytest.approx(weights)
    assert sum(plan.draws for plan in found if plan.steps) == updates


def test_one_update_takes_the_mean_gradient_of_its_passes(teacher):
    """A critic with one update on two passes of 2 samples steps once, where one with a pass of 4 steps to."""
    samples, cond = torch.randn(4, 4, 8, 8, generator=generator(4)), sample_batch(4).cond
    noise = iter([*torch.randn(4, 4, 8, 8, generator=generator(5)).split(2), torch.randn(4, 4, 8, 8, generator=generator(5))])
    found = []
    for passes in (2, 1):
        _, adapters = load(teacher)
        critic = Critic(adapters, CriticConfig(updates=1), passes)
        critic.optimizer.step = lambda critic=critic: found.append([p.grad.clone() for p in critic.parameters])
        for part in torch.arange(4).chunk(passes):
            fixed = torch.Generator().manual_seed(0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "randint", lambda low, high, size, **_: torch.full(size, 400))
                patch.setattr(torch, "randn", lambda *_, **__: next(noise))
                critic.update(samples[part], cond[part], fixed)
    assert len(found) == 2  # one step of each
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_non_finite_step_is_left_out(teacher):
    _, adapters, critic = build(teacher)
    before, cond = copies(adapters, CRITIC), sample_batch().cond
    broken = torch.zeros(2, 4, 8, 8)
    broken[0, 0, 0, 0] = float("inf")
    critic.update(broken, cond, generator())
    assert same(before, copies(adapters, CRITIC)) and critic.state_dict()["optimizer"]["state"] == {}
    critic.update(torch.zeros(2, 4, 8, 8), cond, generator())
    assert not same(before, copies(adapters, CRITIC)) and all(torch.isfinite(p).all() for p in adapters.parameters(CRITIC))


def test_under_autocast_the_critic_computes_with_its_newest_weights(teacher):
    """Autocast keeps 16-bit copies of weights. What was made before an update must not judge after it."""
    _, adapters, critic = build(teacher, updates=2, learning_rate=0.02)
    given = sample_batch()
    x, t, cond = given.z, torch.tensor([999, 300]), given.cond

    def judged():
        with torch.no_grad():
            return adapters.denoiser(CRITIC).network(x, t, cond)

    with torch.autocast("cpu", torch.bfloat16):
        before = judged()
        critic.update(x, cond, generator())
        after = judged()
    with torch.autocast("cpu", torch.bfloat16):
        anew = judged()
    assert torch.equal(after, anew) and not torch.equal(after, before)


def test_the_warm_up_trains_the_critic_alone_before_the_first_update(teacher):
    """The student and its average stay as they were. A critic from a checkpoint after the warm-up is not warmed again."""
    _, adapters = load(teacher)
    matching = {"guidance": (3.0, 3.0), "critic": {"warmup_updates": 3, "learning_rate": 0.01}}
    config = OneStepConfig(terms={"matching": matching}, lora=stages.LORA, loop=stages.LOOP)
    stage = build_stage(config, stages.context(adapters, stages.rows()))
    critic = stage.state()["critic"]
    before, student = copies(adapters, CRITIC), copies(adapters, "student")
    stage._warm_up(generator())
    assert critic.warmed == 3 and not critic.cold
    assert not same(before, copies(adapters, CRITIC)) and same(student, copies(adapters, "student"))
    assert all(p.grad is None for p in adapters.parameters("student"))
    warm = copies(adapters, CRITIC)
    stage._warm_up(generator())
    assert same(warm, copies(adapters, CRITIC))
    other = Critic(load(teacher)[1], config.terms["matching"].critic)
    assert other.cold
    other.load_state_dict(critic.state_dict())
    assert not other.cold
    stage(generator(1))  # no warm-up any more, and the critic's usual updates go on
    assert critic.warmed == 3 and not same(warm, copies(adapters, CRITIC))


def test_a_rollback_slows_the_critic(teacher):
    _, _, critic = build(teacher, learning_rate=0.02)
    critic.slow(0.25)
    assert [group["lr"] for group in critic.optimizer.param_groups] == [0.005]
    assert isinstance(critic, Slowable)  # which the loop asks for


def test_skipped_updates_are_counted_and_said(teacher, caplog):
    _, _, critic = build(teacher, updates=5)
    broken = torch.full((2, 4, 8, 8), float("nan"))
    critic.update(broken, sample_batch().cond, generator())
    assert critic.skipped == 5 and not caplog.records
    critic.update(broken, sample_batch().cond, generator())
    assert critic.skipped == 10 and "The critic's last 10 updates had a non-finite loss" in caplog.text
    critic.update(torch.zeros(2, 4, 8, 8), sample_batch().cond, generator())
    assert (critic.skipped, critic.steps.in_a_row) == (10, 0)


def test_the_critic_s_rank_is_its_own(teacher):
    model = load_teacher(teacher, parts=("backbone",))
    adapters = AdaptedBackbone(
        model.backbone, model.process, **stages.LORA, trainable=("student", CRITIC), fresh_names=(CRITIC,), ranks={CRITIC: 5}
    )  # fmt: skip
    assert {len(a) for _, a, _ in adapters._pairs(CRITIC)} == {5} and {len(a) for _, a, _ in adapters._pairs("student")} == {2}
    assert {layer.scaling[CRITIC] for layer in adapters._layers} == {1}
