"""Distribution matching: the student's gradient by hand, who gets one, what a step calls, the critic, and what else judges a sample."""

import gc

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.schedule import Schedule
from hypersd_pipeline.models.adapters import AdaptedUNet
from hypersd_pipeline.models.lora import merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.rewards import load_reward
from hypersd_pipeline.rewards.base import straight_through_clamp
from hypersd_pipeline.rewards.shipped_quality import ShippedQualityConfig
from hypersd_pipeline.training.adversary import AdversarialConfig, Adversary
from hypersd_pipeline.training.cost import matching_forwards
from hypersd_pipeline.training.distribution import CRITIC, Batch, Critic, CriticConfig, MatchingConfig, MatchingStep, shares
from hypersd_pipeline.training.feedback import RewardTerm

SCHEDULE = Schedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
TARGETS = ("to_q", "to_v", "conv1")
CPU = torch.device("cpu")


def config(**changes):
    return MatchingConfig.model_validate({"guidance": (3.0, 3.0), **changes})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- by hand: networks with one parameter, whose output is the clean sample ("sample") unless said otherwise


class Constant(torch.nn.Module):
    """A network that sees its prompt's first number, plus a parameter, in every pixel; in the place of a UNet with an adapter."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x_t, t, cond):
        return torch.ones_like(x_t) * cond.prompt_embeds[:, 0, 0].view(-1, 1, 1, 1) + self.value

    def denoiser(self, name):
        return self

    def parameters(self, name=None):
        return [self.value]


THETA, REAL, FAKE = 0.5, 0.25 + 3 * (1.0 - 0.25), 1.0 + 0.5  # the guided teacher; the critic sees the prompt, without guidance


def by_hand(weight_of, student_of=lambda theta: lambda x_t, t, cond: theta * x_t, kind="sample"):
    """The step with known scores: loss, gradient at theta, and the batch."""
    theta, teacher, fake = torch.nn.Parameter(torch.tensor(THETA)), Constant(), Constant(0.5)
    z = torch.randn(3, 2, 4, 4, generator=generator(1))
    cond, uncond = (Conditioning(torch.full((3, 1, 1), value)) for value in (1.0, 0.25))
    settings = config(critic={"updates": 1, "learning_rate": 1e-20}, **weight_of)  # a critic that stays as it is
    critic = Critic(fake, settings.critic, SCHEDULE, kind) if settings.matching_weight else None
    target = torch.randn(3, 2, 4, 4, generator=generator(2)) if settings.regression_weight else None
    batch = Batch(z, cond, uncond, target=target)
    loss, scalars = MatchingStep(student_of(theta), teacher, settings, SCHEDULE, kind, critic=critic)(batch, generator())
    loss.backward()
    assert teacher.value.grad is None and fake.value.grad is None
    return loss.item(), theta.grad.item(), batch, scalars


def matching_by_hand(z):
    x = THETA * z
    toward = ((x - REAL) - (x - FAKE)) / (x - REAL).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (0.5 * toward.square().mean()).item(), (toward * z).mean().item()


def regression_by_hand(z, target):
    distance = THETA * z - target
    return distance.square().mean().item(), (2 * distance * z).mean().item()


def test_matching_alone_by_hand():
    loss, gradient, batch, scalars = by_hand({"matching_weight": 0.7})
    value, expected = matching_by_hand(batch.z)
    assert loss == pytest.approx(0.7 * value, rel=1e-4) and gradient == pytest.approx(0.7 * expected, rel=1e-4)
    assert set(scalars) == {"critic", "matching"} and scalars["matching"].item() == pytest.approx((2 * value) ** 0.5, rel=1e-4)


def test_regression_alone_by_hand():
    loss, gradient, batch, scalars = by_hand({"matching_weight": 0.0, "regression_weight": 0.3})
    value, expected = regression_by_hand(batch.z, batch.target)
    assert loss == pytest.approx(0.3 * value, rel=1e-4) and gradient == pytest.approx(0.3 * expected, rel=1e-4)
    assert set(scalars) == {"regression"}


def test_both_are_weighed():
    loss, gradient, batch, _ = by_hand({"matching_weight": 0.7, "regression_weight": 0.3})
    (one, toward), (other, back) = matching_by_hand(batch.z), regression_by_hand(batch.z, batch.target)
    assert loss == pytest.approx(0.7 * one + 0.3 * other, rel=1e-4)
    assert gradient == pytest.approx(0.7 * toward + 0.3 * back, rel=1e-4)


@pytest.mark.parametrize("time", [800, 999])
def test_the_student_is_told_its_time_input(time):
    """An eps model's sample is ``(z - sigma eps) / alpha`` at that time, and so is its gradient."""
    told = []

    def student_of(theta):
        return lambda x_t, t, cond: told.append(t.tolist()) or theta * x_t

    _, gradient, batch, _ = by_hand({"matching_weight": 0.0, "regression_weight": 1.0, "time_input": time}, student_of, "epsilon")
    alpha, sigma = float(SCHEDULE.alphas[time]), float(SCHEDULE.sigmas[time])
    x = (1 - sigma * THETA) / alpha * batch.z
    assert told == [[time] * 3]
    assert gradient == pytest.approx((2 * (x - batch.target) * (-sigma / alpha) * batch.z).mean().item(), rel=1e-4)


@pytest.mark.parametrize("weights", [{}, {"matching_weight": 0.0, "regression_weight": 1.0}])
def test_the_scores_have_no_part_in_the_students_graph(weights):
    """A student that ends as the same sample by a longer way gets the same gradient through its own chain rule, no more."""
    _, gradient, *_ = by_hand(weights)
    _, tripled, *_ = by_hand(weights, lambda theta: lambda x_t, t, cond: (3 * theta - 2 * theta.detach()) * x_t)
    assert tripled == pytest.approx(3 * gradient, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"guidance": (0.5, 3.0)}, "guidance"),
        ({"guidance": (5.0, 3.0)}, "guidance"),
        ({"renoise": (0.5, 0.2)}, "renoise"),
        ({"renoise": (0.02, 1.0)}, "renoise"),
        ({"critic": {"updates": 0}}, "updates"),
    ],
)
def test_settings_out_of_range_are_refused(changes, expected):
    with pytest.raises(ValueError, match=expected):
        config(**changes)


# --- the tiny teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("distribution"))))


def load(teacher, start=None):
    model = load_teacher(teacher, parts=("unet",))
    adapters = AdaptedUNet(
        model.unet, rank=2, target_modules=TARGETS, trainable=("student", CRITIC), fresh_names=(CRITIC,), start=start
    )  # fmt: skip
    return model, adapters


def moved(adapters, *names):
    """Away from zero, where B = 0 would hide half of the gradients."""
    with torch.no_grad():
        for i, name in enumerate(names):
            for parameter in adapters.parameters(name):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(10 + i)))


def build(teacher, settings, adversarial=None, checkpointing=False):
    model, adapters = load(teacher)
    moved(adapters, "student", CRITIC)
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.unet.train()
    adversary = adversarial and Adversary(adapters, adversarial, model.schedule, segments=1, passes=1, seed=0, device=CPU)
    step = MatchingStep(
        adapters.denoiser("student"), adapters.denoiser(None), settings, model.schedule, model.prediction_type,
        ready=lambda: adapters.use("student"), critic=Critic(adapters, settings.critic, model.schedule, model.prediction_type),
        adversary=adversary or None,
    )  # fmt: skip
    return model, adapters, step


def batch(n=2, **more):
    g = generator(3)
    cond, uncond = (Conditioning(torch.randn(n, 5, 32, generator=g)) for _ in range(2))
    return Batch(torch.randn(n, 4, 8, 8, generator=g), cond, uncond, real=torch.randn(n, 4, 8, 8, generator=g), **more)


def with_gradient(unet):
    return {id(p) for p in unet.parameters() if p.grad is not None}


def copies(adapters, name):
    return [p.detach().clone() for p in adapters.parameters(name)]


def same(ones, others):
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def test_the_students_step_leaves_its_gradient_in_the_student_alone(teacher):
    model, adapters, step = build(teacher, config())
    loss, scalars = step(batch(), generator())
    loss.backward()
    student = adapters.parameters("student")
    assert with_gradient(model.unet) == {id(p) for p in student}  # not critic, not average, not base
    assert all(p.grad.abs().sum() > 0 for p in student)
    assert all(not value.requires_grad for value in scalars.values())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_critics_update_moves_the_critic_alone(teacher, requires_grad):
    model, _, step = build(teacher, config())
    before = {name: p.detach().clone() for name, p in model.unet.named_parameters()}
    samples = torch.randn(2, 4, 8, 8, generator=generator(4), requires_grad=requires_grad)
    given = samples * 2 if requires_grad else samples
    loss = step.critic.update(given, batch().cond, generator())
    assert loss.item() > 0 and not loss.requires_grad and samples.grad is None
    assert with_gradient(model.unet) == set()
    changed = {name for name, p in model.unet.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if f".{CRITIC}." in name}


def test_the_critics_update_follows_its_denoising_loss(teacher):
    _, _, step = build(teacher, config(critic={"updates": 10, "learning_rate": 0.02}))
    samples, cond = torch.zeros(4, 4, 8, 8), batch(4).cond
    first, *_, last = [step.critic.update(samples, cond, generator(seed)).item() for seed in (0, 1, 0)]
    assert last < 0.9 * first


@pytest.mark.parametrize("started", [False, True])
def test_the_critic_starts_as_the_base(teacher, started):
    start = None
    if started:
        _, others = load(teacher)
        moved(others, "student")
        start = others.export("student", {})
    _, adapters = load(teacher, start)
    x, t, cond = batch().z, torch.tensor([999, 300]), batch().cond
    with torch.no_grad():
        base, critic, student = (adapters.denoiser(name)(x, t, cond) for name in (None, CRITIC, "student"))
        torch.testing.assert_close(critic, base)
        plain = load_teacher(teacher, parts=("unet",))
        torch.testing.assert_close(base, plain.denoiser()(x, t, cond))
        if start is not None:
            merge_lora(plain.unet, start)
            torch.testing.assert_close(student, plain.denoiser()(x, t, cond), rtol=1e-4, atol=1e-5)
            assert not torch.allclose(student, base, atol=1e-3)


@pytest.mark.parametrize("updates", [1, 3])
def test_what_a_step_calls(teacher, updates):
    model, adapters, step = build(teacher, config(critic={"updates": updates}))
    calls, layer = [], adapters._layers[0]
    model.unet.register_forward_hook(
        lambda module, inputs, output: calls.append(
            (None if layer._disable_adapters else layer._active_adapter[0], len(inputs[0]), torch.is_grad_enabled())
        )
    )
    loss, _ = step(batch(), generator())
    loss.backward()
    assert calls == [("student", 2, True), *[(CRITIC, 2, True)] * updates, (None, 4, False), (CRITIC, 2, False)]


def test_the_critic_takes_one_optimiser_step_an_update(teacher):
    _, _, step = build(teacher, config(critic={"updates": 3}))
    step(batch(), generator())
    assert {int(entry["step"]) for entry in step.critic.state_dict()["optimizer"]["state"].values()} == {3}


def unets():
    gc.collect()
    return {id(o) for o in gc.get_objects() if type(o) is UNet2DConditionModel}


def test_one_unet_is_resident(teacher):
    before = unets()
    model, adapters, step = build(teacher, config())
    assert unets() - before == {id(model.unet)}
    plain = load_teacher(teacher, parts=("unet",)).unet
    count = lambda unet: sum(p.numel() for name, p in unet.named_parameters() if ".lora_" not in name)  # noqa: E731
    assert count(model.unet) == count(plain)
    assert {len(adapters.parameters(name)) for name in adapters.names} == {len(step.critic.parameters)}


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
def test_how_the_critics_updates_are_spread_over_the_passes(updates, passes, draws, weights, steps):
    found = list(shares(updates, passes))
    assert [share.draws for share in found] == draws and [share.steps for share in found] == [bool(s) for s in steps]
    assert [share.weight for share in found] == pytest.approx(weights)
    assert sum(share.draws for share in found if share.steps) == updates


def test_one_update_takes_the_mean_gradient_of_its_passes(teacher):
    """A critic with one update on two passes of 2 samples steps once, where one with a pass of 4 steps to."""
    samples, cond = torch.randn(4, 4, 8, 8, generator=generator(4)), batch(4).cond
    noise = iter([*torch.randn(4, 4, 8, 8, generator=generator(5)).split(2), torch.randn(4, 4, 8, 8, generator=generator(5))])
    found = []
    for passes in (2, 1):
        model, adapters = load(teacher)
        critic = Critic(adapters, CriticConfig(updates=1), model.schedule, model.prediction_type, passes)
        critic.optimizer.step = lambda critic=critic: found.append([p.grad.clone() for p in critic.parameters])
        for part in torch.arange(4).chunk(passes):
            fixed = torch.Generator().manual_seed(0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "randint", lambda high, size, **_: torch.full(size, 400))
                patch.setattr(torch, "randn", lambda *_, **__: next(noise))
                critic.update(samples[part], cond[part], fixed)
    assert len(found) == 2  # one step of each
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_non_finite_critic_step_is_left_out(teacher):
    _, adapters, step = build(teacher, config())
    before, cond = copies(adapters, CRITIC), batch().cond
    broken = torch.zeros(2, 4, 8, 8)
    broken[0, 0, 0, 0] = float("inf")
    step.critic.update(broken, cond, generator())
    assert same(before, copies(adapters, CRITIC)) and step.critic.state_dict()["optimizer"]["state"] == {}
    step.critic.update(torch.zeros(2, 4, 8, 8), cond, generator())
    assert not same(before, copies(adapters, CRITIC)) and all(torch.isfinite(p).all() for p in adapters.parameters(CRITIC))


def test_under_autocast_the_critic_computes_with_its_newest_weights(teacher):
    """Autocast keeps 16-bit copies of weights; what was made before an update must not judge after it."""
    _, adapters, step = build(teacher, config(critic={"updates": 2, "learning_rate": 0.02}))
    x, t, cond = batch().z, torch.tensor([999, 300]), batch().cond

    def judged():
        with torch.no_grad():
            return adapters.denoiser(CRITIC)(x, t, cond)

    with torch.autocast("cpu", torch.bfloat16):
        before = judged()
        step.critic.update(x, cond, generator())
        after = judged()
    with torch.autocast("cpu", torch.bfloat16):
        anew = judged()
    assert torch.equal(after, anew) and not torch.equal(after, before)


GAN = AdversarialConfig(weight=0.5, pair=False, renoise=True, hidden=32)


def test_gradient_checkpointing_gives_the_same_gradients(teacher):
    found = []
    for checkpointing in (False, True):
        _, adapters, step = build(teacher, config(), GAN, checkpointing)
        loss, _ = step(batch(), generator())
        loss.backward()
        found.append([p.grad for p in [*adapters.parameters("student"), *step.adversary.parameters]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_adversary_reaches_student_and_head(teacher):
    model, adapters, step = build(teacher, config(), GAN)
    loss, scalars = step(batch(), generator())
    loss.backward()
    student = adapters.parameters("student")
    assert with_gradient(model.unet) == {id(p) for p in student}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in step.adversary.head.parameters())
    assert sum(p.grad.abs().sum().item() for p in step.adversary.head.parameters()) > 0
    assert {"discriminator_loss", "discriminator_accuracy"} <= set(scalars)


def test_the_value_is_the_weighed_sum_of_all_terms(teacher):
    _, _, step = build(teacher, config(matching_weight=0.7, regression_weight=0.3), GAN)
    loss, scalars = step(batch(target=torch.zeros(2, 4, 8, 8)), generator())
    expected = 0.7 * 0.5 * scalars["matching"] ** 2 + 0.3 * scalars["regression"] + 0.5 * scalars["adversarial"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


# --- what judges a sample, seen at the sample itself: a "student" that puts out its parameter


def at_the_sample(x, step_config, given=None, **judges):
    sample = torch.nn.Parameter(x.clone())
    step = MatchingStep(lambda x_t, t, cond: sample, lambda *_: None, step_config, SCHEDULE, "sample", **judges)
    loss, scalars = step(given or batch(len(x)), generator())
    loss.backward()
    return sample.grad, loss, scalars


def test_balance_makes_the_adversarial_weight_a_share(teacher):
    x, only, none = batch().z, config(matching_weight=0.0, regression_weight=0.3), config(matching_weight=0.0)

    def run(settings, given, adversarial=None, factor=1.0):
        _, adapters = load(teacher)
        adversary = adversarial and Adversary(adapters, adversarial, SCHEDULE, segments=1, passes=1, seed=0, device=CPU)
        if adversary:
            with torch.no_grad():
                adversary.head.layers[-1].weight.mul_(factor)
        return at_the_sample(x, settings, given, adversary=adversary)[0]

    target = batch(target=torch.zeros_like(x))
    regression, alone = run(only, target), run(none, batch(), GAN)
    both = run(only, target, GAN) - regression
    assert both.norm().item() == pytest.approx(0.5 * regression.norm().item(), rel=1e-3)
    torch.testing.assert_close(both / both.norm(), alone / alone.norm(), rtol=1e-3, atol=1e-5)
    unbalanced = GAN.model_copy(update={"balance": False})
    torch.testing.assert_close(run(only, target, unbalanced) - regression, alone, rtol=1e-3, atol=1e-7)
    scaled = run(only, target, GAN, factor=100.0) - regression
    assert scaled.norm().item() == pytest.approx(both.norm().item(), rel=1e-3)


class Brightness:
    """The mean of the pixels, clipped straight-through as every reward must."""

    name = "brightness"

    def score(self, images, prompts):
        assert len(prompts) == len(images)
        return straight_through_clamp(images).mean(dim=(1, 2, 3))


def judged(x, alpha, weight=2.0):
    given = batch(len(x), prompts=["a fox"] * len(x))
    decode = lambda latents: latents[:, :3] + 0.5  # noqa: E731
    return at_the_sample(x, config(matching_weight=0.0), given, rewards=[RewardTerm(Brightness(), alpha, weight)], decode=decode)


def test_a_saturated_picture_still_gets_the_rewards_gradient():
    gradient, loss, scalars = judged(torch.full((2, 4, 8, 8), 5.0), alpha=1.5)
    assert scalars["reward_brightness"].item() == pytest.approx(1.0)  # as if clipped
    assert loss.item() == pytest.approx(2.0 * 0.5)
    assert torch.allclose(gradient[:, :3], torch.tensor(-2.0 / (2 * 3 * 64))) and not gradient[:, 3].any()


def test_a_good_enough_picture_gets_no_gradient():
    x = torch.full((2, 4, 8, 8), 0.2)
    x[1] = -0.2  # brightness 0.7 and 0.3
    gradient, loss, _ = judged(x, alpha=0.5)
    assert not gradient[0].any() and gradient[1, :3].all()
    assert loss.item() == pytest.approx(2.0 * 0.2 / 2, rel=1e-4)
    assert not judged(x, alpha=0.1)[0].any()


def test_the_shipped_reward_through_the_tiny_decoder(teacher):
    """Decoded far outside of [0, 1], every sample is still pulled."""
    model = load_teacher(teacher, parts=("vae",))
    quality = load_reward(ShippedQualityConfig(kind="shipped_quality"))
    x, decode = batch().z, lambda latents: 0.5 + 100 * (model.decode(latents, clip=False) - 0.5)  # a tiny random decoder is all grey
    with torch.no_grad():
        assert ((decode(x) - 0.5).abs() > 0.5).float().mean() > 0.9
    gradient, _, scalars = at_the_sample(
        x, config(matching_weight=0.0), batch(prompts=["a fox", "an owl"]), rewards=[RewardTerm(quality, 100.0, 1.0)],
        decode=decode,
    )  # fmt: skip
    assert "reward_shipped_quality" in scalars
    assert (gradient.abs().sum(dim=(1, 2, 3)) > 0).all() and torch.isfinite(gradient).all()
    assert all(p.grad is None for p in [*model.vae.parameters(), *quality.parameters()])


@pytest.mark.parametrize(
    ("changes", "adversarial", "full", "expected"),
    [
        ({}, False, False, 2 + 2 + 1 + 2 * 2),
        ({"critic": CriticConfig(updates=5)}, False, False, 2 + 2 + 1 + 2 * 5),
        ({}, True, False, 9 + 3 * 0.35),
        ({}, False, True, 3 + 2 + 1 + 2 * 2),
        ({"consistency_weight": 1.0, "consistency_batch": 16}, False, False, 9 + 5 * 16 / 32),
        ({"consistency_weight": 1.0, "consistency_batch": 16}, False, True, 10),  # a full UNet has no other steps to keep
        ({"matching_weight": 0.0, "regression_weight": 1.0}, False, False, 2),
        ({"matching_weight": 0.0, "regression_weight": 1.0}, True, True, 3 + 3 * 0.35),
        ({"critic": CriticConfig(updates=5), "passes": 2}, False, False, 2 + 2 + 1 + 2 * 2.5),
        ({"critic": CriticConfig(updates=5), "passes": 16}, False, False, 2 + 2 + 1 + 2),  # once a pass, for the mean gradient
    ],
)
def test_ideal_cost_by_hand(changes, adversarial, full, expected):
    passes = changes.pop("passes", 1)
    assert matching_forwards(config(**changes), 32, 0.35, adversarial=adversarial, full=full, passes=passes) == pytest.approx(expected)
