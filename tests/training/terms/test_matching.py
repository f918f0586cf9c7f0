"""Distribution matching and regression: the student's gradient by hand, who gets one, and what a step calls."""

import gc

import pytest
import stages
import tiny
import torch
from diffusers import UNet2DConditionModel
from stages import generator, sample_batch, sampled, term_of

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.recipes.distil import make_adapters
from hypersd_pipeline.training.config import OneStepConfig
from hypersd_pipeline.training.critic import CRITIC
from hypersd_pipeline.training.rollouts import SampleBatch
from hypersd_pipeline.training.stage import build_stage
from hypersd_pipeline.training.terms import ConsistencyConfig, MatchingConfig
from hypersd_pipeline.training.terms.adversarial import Adversary
from hypersd_pipeline.training.terms.matching import Matching

PROCESS = stages.process()
GAN = {"weight": 0.5, "pair": False, "renoise": True, "hidden": 32}


def matching(**changes):
    return {"guidance": (3.0, 3.0), **changes}


def config(sample=None, checkpointing=False, **terms):
    return OneStepConfig(
        terms=terms or {"matching": matching()},
        sample=sample or {},
        gradient_checkpointing=checkpointing,
        lora=stages.LORA,
        loop=stages.LOOP,
    )


# --- by hand: networks with one parameter, whose output is the clean sample ("sample") unless said otherwise


class Constant(torch.nn.Module):
    """A network that sees its prompt's first number, plus a parameter, in every pixel."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x_t, t, cond):
        return torch.ones_like(x_t) * cond.prompt_embeds[:, 0, 0].view(-1, 1, 1, 1) + self.value


THETA, REAL, FAKE = 0.5, 0.25 + 3 * (1.0 - 0.25), 1.0 + 0.5  # the guided teacher. The critic sees the prompt, without guidance
UNMOVED = {"updates": 1, "learning_rate": 1e-20}  # a critic that stays as it is


def by_hand(terms, student_of=lambda theta: lambda x_t, t, cond: theta * x_t, kind="sample", sample=None):
    """The stage with known scores: loss, gradient at theta, and the batch."""
    theta, teacher, fake = torch.nn.Parameter(torch.tensor(THETA)), Constant(), Constant(0.5)
    networks = stages.Networks(stages.process(kind), base=teacher, critic=fake, student=student_of(theta))
    z, target = (torch.randn(3, 2, 4, 4, generator=generator(seed)) for seed in (1, 2))
    cond, uncond = (Conditioning(torch.full((3, 1, 1), value)) for value in (1.0, 0.25))
    batch = SampleBatch(z, cond, uncond, [], target, None)
    context = stages.context(networks, stages.Rows(z, cond, uncond), pairs=stages.pairs())
    loss, scalars = sampled(build_stage(config(sample, **terms), context), batch)(generator())
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
    loss, gradient, batch, scalars = by_hand({"matching": matching(weight=0.7, critic=UNMOVED)})
    value, expected = matching_by_hand(batch.z)
    assert loss == pytest.approx(0.7 * value, rel=1e-4) and gradient == pytest.approx(0.7 * expected, rel=1e-4)
    assert set(scalars) == {"critic", "matching", "matching_silent", "critic_skipped"} and scalars["matching"].item() == pytest.approx(
        (2 * value) ** 0.5, rel=1e-4
    )


def test_decoupled_matching_by_hand():
    """The teacher without guidance sees 1, with it 2.5. Each part has its own mean, and its own noise level, which is not seen here."""
    loss, gradient, batch, _ = by_hand({"matching": matching(critic=UNMOVED, guidance_renoise=(0.1, 0.9))})
    x, dims = THETA * batch.z, {"dim": (1, 2, 3), "keepdim": True}
    toward = 0.5 / (x - 1.0).abs().mean(**dims) + 2 * (0.25 - 1.0) / (x - REAL).abs().mean(**dims) + 0 * x
    assert loss == pytest.approx((0.5 * toward.square().mean()).item(), rel=1e-4)
    assert gradient == pytest.approx((toward * batch.z).mean().item(), rel=1e-4)


def test_regression_alone_by_hand():
    loss, gradient, batch, scalars = by_hand({"regression": {"weight": 0.3}})
    value, expected = regression_by_hand(batch.z, batch.target)
    assert loss == pytest.approx(0.3 * value, rel=1e-4) and gradient == pytest.approx(0.3 * expected, rel=1e-4)
    assert set(scalars) == {"regression"}


def test_both_are_weighed():
    loss, gradient, batch, _ = by_hand({"matching": matching(weight=0.7, critic=UNMOVED), "regression": {"weight": 0.3}})
    (one, toward), (other, back) = matching_by_hand(batch.z), regression_by_hand(batch.z, batch.target)
    assert loss == pytest.approx(0.7 * one + 0.3 * other, rel=1e-4)
    assert gradient == pytest.approx(0.7 * toward + 0.3 * back, rel=1e-4)


def test_a_part_of_the_samples_is_matched_and_all_are_regressed():
    """The matched part's mean is over that part: a smaller batch of it changes neither term's weight."""
    loss, gradient, batch, _ = by_hand({"matching": matching(batch=2, critic=UNMOVED), "regression": {}})
    (one, toward), (other, back) = matching_by_hand(batch.z[:2]), regression_by_hand(batch.z, batch.target)
    assert loss == pytest.approx(one + other, rel=1e-4) and gradient == pytest.approx(toward + back, rel=1e-4)


@pytest.mark.parametrize("time", [800, 999])
def test_the_student_is_told_its_timestep(time):
    """An eps model's sample is ``(z - sigma eps) / alpha`` at that time, and so is its gradient."""
    told = []

    def student_of(theta):
        return lambda x_t, t, cond: told.append(t.tolist()) or theta * x_t

    _, gradient, batch, _ = by_hand({"regression": {}}, student_of, "epsilon", sample={"timestep": time})
    alpha, sigma = float(PROCESS.alphas[time]), float(PROCESS.sigmas[time])
    x = (1 - sigma * THETA) / alpha * batch.z
    assert told == [[time] * 3]
    assert gradient == pytest.approx((2 * (x - batch.target) * (-sigma / alpha) * batch.z).mean().item(), rel=1e-4)


@pytest.mark.parametrize("terms", [{"matching": matching(critic=UNMOVED)}, {"regression": {}}])
def test_the_scores_have_no_part_in_the_students_graph(terms):
    """A student that ends as the same sample by a longer way gets the same gradient through its own chain rule, no more."""
    _, gradient, *_ = by_hand(terms)
    _, tripled, *_ = by_hand(terms, lambda theta: lambda x_t, t, cond: (3 * theta - 2 * theta.detach()) * x_t)
    assert tripled == pytest.approx(3 * gradient, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"guidance": (0.5, 3.0)}, "guidance"),
        ({"guidance": (5.0, 3.0)}, "guidance"),
        ({"renoise": (0.5, 0.2)}, "renoise"),
        ({"renoise": (0.02, 1.0)}, "renoise"),
        ({"guidance_renoise": (0.9, 0.1)}, "guidance_renoise"),
        ({"critic": {"updates": 0}}, "updates"),
    ],
)
def test_settings_out_of_range_are_refused(changes, expected):
    with pytest.raises(ValueError, match=expected):
        MatchingConfig.model_validate(matching(**changes))


@pytest.mark.parametrize("guidance", [(0.5, 3.0), (5.0, 3.0)])
def test_the_solvers_guidance_is_checked_too(guidance):
    with pytest.raises(ValueError, match=r"guidance(.|\n)*(rising pair of scales from 1 on|greater than or equal to 1)"):
        ConsistencyConfig(segments=1, guidance=guidance)


# --- the tiny teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("distribution"))))


def build(teacher, settings=None, **given):
    settings = settings or config()
    model = load_teacher(teacher, parts=("backbone",))
    adapters = make_adapters(model, settings)
    stages.moved(adapters, "student", CRITIC)
    stage = build_stage(
        settings, stages.context(adapters, stages.rows(), batch=2, pairs=stages.pairs()), ready=lambda: adapters.use("student")
    )
    return model, adapters, sampled(stage, sample_batch(**given))


def with_gradient(module):
    return {id(p) for p in module.parameters() if p.grad is not None}


def test_the_students_step_leaves_its_gradient_in_the_student_alone(teacher):
    model, adapters, stage = build(teacher)
    loss, scalars = stage(generator())
    loss.backward()
    student = adapters.parameters("student")
    assert with_gradient(model.backbone.module) == {id(p) for p in student}  # not critic, not average, not base
    assert all(p.grad.abs().sum() > 0 for p in student)
    assert all(not value.requires_grad for value in scalars.values())


@pytest.mark.parametrize("updates", [1, 3])
def test_what_a_step_calls(teacher, updates):
    _, adapters, stage = build(teacher, config(matching=matching(critic={"updates": updates})))
    calls = stages.passes(adapters)
    loss, _ = stage(generator())
    loss.backward()
    assert calls == [("student", 2, True), *[(CRITIC, 2, True)] * updates, (None, 4, False), (CRITIC, 2, False)]


def test_what_a_decoupled_step_calls(teacher):
    """Real scores: one with the prompt for matching, and both halves for guidance, of which the student's timestep bounds the noise."""
    settings = config(sample={"timestep": 300}, matching=matching(guidance_renoise=(0.02, 0.98)))
    _, adapters, stage = build(teacher, settings)
    calls, told = stages.passes(adapters), []
    adapters.backbone.module.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1].tolist()))
    loss, _ = stage(generator())
    loss.backward()
    assert calls[-3:] == [(None, 2, False), (CRITIC, 2, False), (None, 4, False)]
    assert told[-1][:2] == told[-1][2:] and max(told[-1]) <= 300


def unets():
    gc.collect()
    return {id(o) for o in gc.get_objects() if type(o) is UNet2DConditionModel}


def test_one_unet_is_resident(teacher):
    before = unets()
    model, adapters, stage = build(teacher)
    assert unets() - before == {id(model.backbone.module)}
    plain = load_teacher(teacher, parts=("backbone",)).backbone.module
    count = lambda module: sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name)  # noqa: E731
    assert count(model.backbone.module) == count(plain)
    assert {len(adapters.parameters(name)) for name in adapters.names} == {len(term_of(stage, Matching).critic.parameters)}


def test_gradient_checkpointing_gives_the_same_gradients(teacher):
    found = []
    for checkpointing in (False, True):
        _, adapters, stage = build(teacher, config(matching=matching(), adversarial=GAN, checkpointing=checkpointing))
        loss, _ = stage(generator())
        loss.backward()
        found.append([p.grad for p in [*adapters.parameters("student"), *stage.adversary.parameters]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_adversary_reaches_student_and_head(teacher):
    model, adapters, stage = build(teacher, config(matching=matching(), adversarial=GAN))
    loss, scalars = stage(generator())
    loss.backward()
    student, head = adapters.parameters("student"), list(term_of(stage, Adversary).head.parameters())
    assert with_gradient(model.backbone.module) == {id(p) for p in student}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in head)
    assert sum(p.grad.abs().sum().item() for p in head) > 0
    assert {"discriminator_loss", "discriminator_accuracy"} <= set(scalars)


def test_the_value_is_the_weighed_sum_of_all_terms(teacher):
    settings = config(matching=matching(weight=0.7), regression={"weight": 0.3}, adversarial=GAN)
    _, _, stage = build(teacher, settings, target=torch.zeros(2, 4, 8, 8))
    loss, scalars = stage(generator())
    expected = 0.7 * 0.5 * scalars["matching"] ** 2 + 0.3 * scalars["regression"] + 0.5 * scalars["adversarial"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
