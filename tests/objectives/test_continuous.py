"""Continuous-time consistency (sCM): tangents of Gaussian data by hand, of a real UNet by finite differences, and what a student learns."""

import functools

import pytest
import stages
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.models.folded import in_plain_operations
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.objectives import continuous
from hypersd_pipeline.recipes.distil import make_adapters
from hypersd_pipeline.training.config import StageConfig, changed
from hypersd_pipeline.training.rollouts import Trajectory
from hypersd_pipeline.training.stage import build_stage

SPREAD = 0.4
"""Standard deviation of the data of the tests by hand."""
COND = Conditioning(torch.zeros(3, 1, 1))


def angle_of(process, told):
    """The angle of a real timestep, linear between timesteps. [b] -> [b, 1, 1, 1]."""
    table = torch.atan2(process.sigmas, process.alphas)
    low = told.detach().floor().long().clamp(0, len(table) - 2)
    return (table[low] + (told - low) * (table[low + 1] - table[low])).view(-1, 1, 1, 1)


def gaussian(process, velocity_of):
    """A network of the process's kind whose TrigFlow velocity is ``velocity_of(x, angle)``."""

    def network(x, told, cond):
        a = angle_of(process, told)
        F = velocity_of(x.double(), a)
        x0, eps = a.cos() * x - a.sin() * F, a.sin() * x + a.cos() * F
        output = {"epsilon": eps, "v_prediction": F, "sample": x0}[process.prediction_type]
        return output.to(x.dtype)

    return Denoiser(network, process)


def spread_at(a):
    """Standard deviation of the noisy data."""
    return (a.cos() ** 2 * SPREAD**2 + a.sin() ** 2).sqrt()


def teachers_velocity(x, a):
    """Of Gaussian data: x grows along the ODE as the noisy data's deviation does, ``dx/da = (d std/da) / std x``."""
    return a.cos() * a.sin() * (1 - SPREAD**2) / spread_at(a) ** 2 * x


def exact_velocity(x, a):
    """F of the exact consistency function ``f = x SPREAD / std(a)``."""
    return (a.cos() - SPREAD / spread_at(a)) / a.sin() * x


def points(process, times=(100, 500, 900)):
    x = torch.randn(3, 2, 4, 4, generator=stages.generator(), dtype=torch.float64)
    t = torch.tensor(times)
    return x, t, process.angle(t, x)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_teachers_velocity_is_that_of_the_ode(kind):
    process = stages.process(kind)
    x, t, a = points(process)
    found = continuous.teacher_velocity(gaussian(process, teachers_velocity), x, t, COND)
    torch.testing.assert_close(found, teachers_velocity(x, a), rtol=1e-5, atol=1e-6)


def test_differences_between_timesteps_give_the_same_derivative():
    process = stages.process()
    x, t, a = points(process, (100, 500, 999))
    velocity = teachers_velocity(x, a)
    for velocity_of in (teachers_velocity, exact_velocity):
        exact, near = (
            along(gaussian(process, velocity_of), x, t, COND, velocity)
            for along in (continuous.velocity_along, functools.partial(continuous.velocity_between, span=3))
        )
        torch.testing.assert_close(near[0], exact[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(near[1], exact[1], rtol=0.03, atol=0.01)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_exact_consistency_function_has_no_tangent(kind):
    process = stages.process(kind)
    x, t, a = points(process)
    velocity = teachers_velocity(x, a)
    F, dF = continuous.velocity_along(gaussian(process, exact_velocity), x, t, COND, velocity)
    torch.testing.assert_close(F, exact_velocity(x, a), rtol=1e-5, atol=1e-6)
    g = continuous.tangent(F, dF, x, velocity, a)
    half = continuous.tangent(F, dF, x, velocity, a, warm=0.0)  # of which this is the first part
    assert g.abs().max() < 0.01 * half.abs().max()  # the angle is linear between timesteps here, and the pace a central difference


def test_the_tangent_of_the_teacher_itself_by_hand():
    """For F = dx/da = m x with m' by the quotient rule: df/da = -sin a (x + dF/da), and dF/da = (m' + m^2) x."""
    process = stages.process()
    x, t, a = points(process)
    velocity, std2 = teachers_velocity(x, a), spread_at(a) ** 2
    k = 1 - SPREAD**2
    m = k * a.cos() * a.sin() / std2
    slope = k * (a.cos() ** 2 - a.sin() ** 2) / std2 - 2 * m**2  # d std2 / da = 2 k cos a sin a
    by_hand = -a.cos() * a.sin() * (1 + slope + m**2) * x
    F, dF = continuous.velocity_along(gaussian(process, teachers_velocity), x, t, COND, velocity)
    torch.testing.assert_close(continuous.tangent(F, dF, x, velocity, a), by_hand, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(continuous.tangent(F, dF, x, velocity, a, 0.25), 0.25 * by_hand, rtol=0.02, atol=1e-3)


def test_normalised_tangents_and_their_gradient():
    x, _, a = points(stages.process())
    g = continuous.normalised(3.0 * x)
    norm = (3.0 * x).flatten(1).norm(dim=1)
    torch.testing.assert_close(g.flatten(1).norm(dim=1), norm / (norm + 0.1))
    F = torch.randn(x.shape, generator=stages.generator(2), dtype=torch.float64, requires_grad=True)
    loss = continuous.velocity_error(a.cos() * x - a.sin() * F, continuous.clean_target(F.detach(), g, x, a), a)
    loss.backward()
    torch.testing.assert_close(F.grad, -2 * g / g.numel(), rtol=1e-5, atol=1e-9)
    assert loss.item() == pytest.approx(g.square().mean().item(), rel=1e-5)


def test_a_student_that_starts_as_the_teacher_becomes_the_exact_consistency_function():
    """F = u exact + v teacher. The teacher is (0, 1), and the exact function (1, 0) is where the training ends."""
    process, g = stages.process(), stages.generator(5)
    mixed = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    teacher = gaussian(process, teachers_velocity)
    student = gaussian(process, lambda x, a: mixed[0] * exact_velocity(x, a) + mixed[1] * teachers_velocity(x, a))
    optimizer, cond = torch.optim.Adam([mixed], lr=0.1), Conditioning(torch.zeros(16, 1, 1))
    for step in range(150):
        t = torch.randint(20, 1000, (16,), generator=g)
        z = torch.randn(16, 1, 1, 1, generator=g, dtype=torch.float64)
        a = process.angle(t, z)
        x = spread_at(a) * z
        velocity = continuous.teacher_velocity(teacher, x, t, cond)
        F, dF = continuous.velocity_along(student, x, t, cond, velocity)
        moved = continuous.normalised(continuous.tangent(F, dF, x, velocity, a, min(1.0, step / 30)))
        x0, _ = student.predict(x, t, cond)
        optimizer.zero_grad()
        continuous.velocity_error(x0, continuous.clean_target(F, moved, x, a), a).backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
    assert mixed.tolist() == pytest.approx([1.0, 0.0], abs=0.05)


# --- the tiny teacher with a LoRA

CONFIG = StageConfig(
    terms={"consistency": {"segments": 1, "ends": "segment_start", "target": "tangent", "guidance": (3.0, 3.0), "tangent_warmup": 4}},
    lora=stages.LORA,
    loop=stages.LOOP,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("continuous"))))


def build(teacher, config=CONFIG):
    model = load_teacher(teacher, parts=("backbone",))
    adapters = make_adapters(model, config)
    stages.moved(adapters, "student")
    return adapters, build_stage(config, stages.context(adapters, stages.rows()), ready=lambda: adapters.use("student"))


def test_the_unets_derivative_is_that_of_finite_differences(teacher):
    adapters, _ = build(teacher)
    student, process, data = adapters.denoiser("student"), adapters.process, stages.rows(3)
    x, t = data.latents, torch.tensor([100, 500, 900])
    velocity = torch.randn(x.shape, generator=stages.generator(8)).double()
    with in_plain_operations(), sdpa_kernel(SDPBackend.MATH):
        F, dF = continuous.velocity_along(student, x, t, data.cond, velocity)

    def differences(function, point, direction, h=1e-4):  # a sixteenth of a timestep. The network computes in float32
        ahead, behind = (function(*((p + s * h * d).to(p) for p, d in zip(point, direction, strict=True))) for s in (1, -1))
        return function(*point), (ahead - behind) / (2 * h)

    plain, slope = continuous.velocity_along(student, x, t, data.cond, velocity, differences)
    torch.testing.assert_close(F, plain, rtol=1e-4, atol=1e-4)
    assert (dF - slope).norm() < 0.01 * slope.norm()
    x0, eps = student.predict(x, t, data.cond)
    torch.testing.assert_close(F, process.velocity(x0, eps, process.angle(t, x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("span", [0, 5])
def test_a_pass_of_the_stage(teacher, span):
    """The student alone gets a gradient, its loss is the normalised tangent's size, and the warm-up is in the checkpoint."""
    adapters, stage = build(teacher, changed(CONFIG, terms={"consistency": {"tangent_span": span}}))
    ((rollout, _),) = stage.parts
    assert isinstance(rollout, Trajectory)
    found = []
    for expected in (0.0, 0.25, 0.5):
        assert rollout.passed == 4 * expected
        loss, _ = stage(stages.generator())
        found.append(loss.item())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters("student"))
    assert all(p.grad is None for p in adapters.parameters("ema"))
    assert len(set(found)) == 3 and all(0 < value < 1 / 256 for value in found)  # |g| < 1 over 256 numbers
    again = build(teacher)[1]
    again.state()["trajectory"].load_state_dict(stage.state()["trajectory"].state_dict())
    stage(stages.generator())
    assert again(stages.generator())[0].item() != pytest.approx(found[2], rel=1e-6)
    assert "trajectory" not in build(teacher, changed(CONFIG, terms={"consistency": {"tangent_warmup": 0}}))[1].state()


@pytest.mark.parametrize("change", [{"segments": 2}, {"ends": "uniform"}, {"distance": "huber"}])
def test_what_a_tangent_does_not_go_with(change):
    with pytest.raises(ValueError, match="target: tangent needs segments: 1"):
        changed(CONFIG, terms={"consistency": change})
    with pytest.raises(ValueError, match="a tangent is no sample"):
        changed(CONFIG, terms={"adversarial": {"kind": "adversarial", "weight": 0.5}})
