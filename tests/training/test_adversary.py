"""The hybrid distance: who gets a gradient, one student graph a step, exact resume, alarms, and checkpointing."""

import logging

import pytest
import tiny
import torch
from test_layouts import prepare

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.schedule import Schedule, add_noise, renoise
from hypersd_pipeline.models.discriminator import encode_to_mid, make_head
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.objectives import adversarial
from hypersd_pipeline.pipelines.tscd.nodes import distil
from hypersd_pipeline.training.adversary import Adversary
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.cost import ideal_forwards, with_cost
from hypersd_pipeline.training.distillation import DistillationStep, StageConfig, make_adapters, make_adversary

CONFIG = StageConfig(
    segments=2,
    guidance=(3.0, 5.0),
    adversarial={"weight": 0.5, "hidden": 32},
    lora={"rank": 2, "target_modules": ("to_q", "to_v", "conv1")},
    loop={"steps": 4, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "checkpoint_every": 2},
)
CPU = torch.device("cpu")


def variant(**changes):
    return StageConfig.model_validate({**CONFIG.model_dump(), **changes})


def with_adversarial(**changes):
    return variant(adversarial={**CONFIG.adversarial.model_dump(), **changes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("sd15"))))


def build(checkpoint, config):
    model = load_teacher(checkpoint, parts=("unet",))
    adapters = make_adapters(model.unet, config)
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.unet.train()
    with torch.no_grad():  # away from zero, where B = 0 would hide half of the gradients
        for parameter in adapters.parameters("student"):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    adversary = make_adversary(adapters, config, model.schedule, CPU)
    return model, adapters, adversary, DistillationStep(adapters, config, model.schedule, model.prediction_type, CPU, adversary)


def batch(n=4):
    generator = torch.Generator().manual_seed(3)
    cond, uncond = (Conditioning(torch.randn(n, 5, 32, generator=generator)) for _ in range(2))
    return torch.randn(n, 4, 8, 8, generator=generator), cond, uncond


def gradients(checkpoint, config):
    _, adapters, adversary, step = build(checkpoint, config)
    loss, scalars = step(*batch(), torch.Generator().manual_seed(0))
    loss.backward()
    return loss, scalars, adapters, adversary


def test_losses_by_hand():
    real, fake = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])
    softplus = lambda x: torch.log1p(torch.exp(torch.tensor(x)))  # noqa: E731
    assert adversarial.discriminator_loss(real, fake).item() == pytest.approx(
        float((softplus(0.0) + softplus(-2.0)) / 2 + (softplus(0.0) + softplus(-1.0)) / 2)
    )
    assert adversarial.generator_loss(fake).item() == pytest.approx(float((softplus(0.0) + softplus(1.0)) / 2))
    scaled = adversarial.balanced(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]))
    assert torch.allclose(scaled, torch.tensor([0.6, 0.8]))
    assert torch.equal(adversarial.balanced(torch.tensor([3.0]), torch.zeros(1)), torch.tensor([3.0]))
    assert torch.isfinite(adversarial.balanced(torch.zeros(2), torch.ones(2))).all()


def test_mid_features_are_those_of_the_whole_forward_pass(tmp_path):
    for layout in ("sd15", "sdxl"):
        model = load_teacher(TeacherConfig(source=str(tiny.write_teacher(tmp_path / layout, layout))))
        cond = model.encode_prompts(["a red apple", "two cats"])
        x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
        seen = []
        handle = model.unet.mid_block.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output))
        with torch.no_grad():
            model.unet(x, t, **cond.unet_kwargs())
            handle.remove()
            assert torch.equal(encode_to_mid(model.unet, x, t, cond), seen[0])
        assert make_head(model.unet, 32, 1, seed=0)(seen[0]).shape == (2,)


@pytest.mark.parametrize(("encoder", "teacher"), [("frozen", "base"), ("adapter", "base"), ("frozen", "previous_stage")])
def test_who_gets_a_gradient(checkpoint, encoder, teacher):
    _, _, adapters, adversary = gradients(
        checkpoint, variant(adversarial={**CONFIG.adversarial.model_dump(), "encoder": encoder}, teacher=teacher)
    )
    student = {id(p) for p in adapters.parameters("student")}
    judge = {id(p) for p in adversary.parameters}
    assert all(p.grad is not None for p in adapters.parameters("student"))
    assert all(p.grad is not None for p in adversary.head.parameters())
    for name, parameter in adapters.unet.named_parameters():
        if parameter.grad is not None:
            assert id(parameter) in student | judge, name  # not the base, not the averaged student
    if encoder == "adapter":
        pairs = adapters._pairs("discriminator")
        assert pairs and all(name.startswith(("down_blocks", "mid_block")) for name, _, _ in pairs)
        assert all(b.grad is not None and b.grad.abs().sum() > 0 for _, _, b in pairs)


def test_the_discriminators_gradient_is_its_own_loss_and_the_students_is_not(checkpoint):
    """Against plain autograd: the discriminator's loss through the head alone, the student's through everything but the head."""
    config = with_adversarial(balance=False)
    model, adapters, adversary, step = build(checkpoint, config)
    captured = {}
    judge = adversary.judge
    adversary.judge = lambda *a: captured.setdefault("inputs", a) and judge(*a)
    loss, _ = step(*batch(), torch.Generator().manual_seed(0))
    loss.backward()
    x_t, t, leaf, target, s, cond, _, seen = captured["inputs"]
    adapters.use(None)
    f_t, f_real, f_fake = (encode_to_mid(model.unet, x, at, cond) for x, at in ((x_t, t), (target, s), (leaf, s)))
    assert torch.allclose(seen, f_t, atol=1e-5)  # taken from the teacher's own pass
    real, fake = adversary.head(torch.cat([f_real, f_t], 1)), adversary.head(torch.cat([f_fake, f_t], 1))
    wanted = torch.autograd.grad(adversarial.discriminator_loss(real, fake), list(adversary.head.parameters()), retain_graph=True)
    for parameter, gradient in zip(adversary.head.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)
    whole = step.distance(leaf, target) + 0.5 * adversarial.generator_loss(fake)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    (direction,) = torch.autograd.grad(whole, leaf)
    again = build(checkpoint, variant(adversarial={}))  # the same student, once more, without an adversary
    from hypersd_pipeline.objectives import tscd

    times_n = t
    prediction = tscd.jump(again[1].denoiser("student"), x_t, times_n, s, cond, model.schedule, "epsilon")
    prediction.backward(direction)
    for one, other in zip(adapters.parameters("student"), again[1].parameters("student"), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


@pytest.mark.parametrize("encoder", ["frozen", "adapter"])
def test_the_students_graph_is_built_once(checkpoint, encoder):
    _, adapters, _, step = build(checkpoint, with_adversarial(encoder=encoder))
    calls = []
    adapters.unet.register_forward_hook(
        lambda module, inputs, output: calls.append((adapters._layers[0]._disable_adapters, len(inputs[0]), torch.is_grad_enabled()))
    )
    middle = []
    adapters.unet.mid_block.register_forward_hook(lambda module, inputs, output: middle.append(len(output)))
    loss, _ = step(*batch(), torch.Generator().manual_seed(0))
    loss.backward()
    assert calls == [(True, 8, False), (False, 4, False), (False, 4, True)]  # teacher with both halves, target, student
    assert middle == [
        8,
        4,
        4,
        *((4, 4) if encoder == "frozen" else (8, 4)),
    ]  # target (with x_t), prediction
    assert ideal_forwards(with_adversarial(encoder=encoder), 0.35) == pytest.approx(5 + (3 if encoder == "frozen" else 7) * 0.35)


@pytest.mark.parametrize("encoder", ["frozen", "adapter"])
def test_gradient_checkpointing_gives_the_same_gradients(checkpoint, encoder):
    plain = gradients(checkpoint, with_adversarial(encoder=encoder))
    saved = gradients(checkpoint, variant(adversarial={**CONFIG.adversarial.model_dump(), "encoder": encoder}, gradient_checkpointing=True))
    for one, other in ((plain[2].parameters("student"), saved[2].parameters("student")), (plain[3].parameters, saved[3].parameters)):
        assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in zip(one, other, strict=True))


def test_balance_makes_the_weight_a_share(checkpoint, monkeypatch):
    """Whatever the scale of the head, its gradient at the prediction has the norm of the squared error's."""
    from hypersd_pipeline.training import distillation

    norms = []
    scale = distillation.balanced

    def spy(gradient, reference):
        norms.append((gradient.norm().item(), scale(gradient, reference).norm().item(), reference.norm().item()))
        return scale(gradient, reference)

    monkeypatch.setattr(distillation, "balanced", spy)
    for factor in (1.0, 100.0):
        _, _, adversary, step = build(checkpoint, CONFIG)
        with torch.no_grad():
            adversary.head.layers[-1].weight.mul_(factor)
        step(*batch(), torch.Generator().manual_seed(0))
    assert norms[1][0] > 5 * norms[0][0]
    assert norms[1][1] == pytest.approx(norms[1][2], rel=1e-4) and norms[0][1] == pytest.approx(norms[1][1], rel=1e-4)


def test_renoise_meets_the_forward_process():
    schedule = Schedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    x0, a, b = (torch.randn(2000, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    s, t = torch.full((2000,), 249), torch.full((2000,), 700)
    x_s = add_noise(x0, a, s, schedule)
    assert torch.equal(renoise(x_s, s, s, b, schedule), x_s)
    moved = renoise(x_s, s, t, b, schedule)
    alpha, sigma = schedule.at(t[:1], x0[:1])
    assert (moved - alpha.float() * x0).std().item() == pytest.approx(float(sigma), rel=0.02)


def test_renoised_and_single_point_judgement(checkpoint):
    loss, scalars, _, adversary = gradients(checkpoint, with_adversarial(renoise=True, pair=False))
    assert torch.isfinite(loss) and 0 <= scalars["discriminator_accuracy"] <= 1
    assert all(p.grad is not None for p in adversary.parameters)


def test_discriminator_resumes_bit_for_bit(tmp_path_factory, tmp_path):
    folder = tmp_path_factory.mktemp("resume")
    teacher = TeacherConfig(source=str(tiny.write_sd15(folder)))
    latents = prepare(folder, teacher)
    config = with_adversarial(encoder="adapter")

    def run(path, stream=lambda values, step: None):
        lora, report = distil(latents, teacher, config, CheckpointStore(path), stream)
        (key,) = [p for p in path.iterdir() if p.is_dir()]
        return lora, CheckpointStore(path).load(key.name)[1], report

    whole = run(tmp_path / "whole")

    def dies(values, step):
        if step == 3:
            raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError, match="went away"):
        run(tmp_path / "parts", dies)
    parts = run(tmp_path / "parts")
    assert all(torch.equal(whole[0].tensors[k], parts[0].tensors[k]) for k in whole[0].tensors)
    for part in ("modules", "optimizers"):
        assert_same(whole[1][part], parts[1][part])
    assert whole[1]["optimizers"]["discriminator"]["state"] and "discriminator" in whole[1]["modules"]["adapters"]
    assert whole[2]["ideal_forwards"] > 5 and whole[2]["step_over_ideal"] > 0


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_the_alarm_counts_updates_not_passes(checkpoint):
    model, adapters, _, _ = build(checkpoint, CONFIG)
    adversary = Adversary(adapters, CONFIG.adversarial, model.schedule, segments=2, passes=2, seed=0, device=CPU)
    answers = iter([5.0, -5.0, 5.0, -5.0, -5.0, 5.0, 5.0, -5.0, 5.0, -5.0])  # logits of real and fake: right, right; wrong, right; right
    adversary._logits = lambda features, seen: features.mean() * 0 + next(answers) + 0 * adversary.head.layers[-1].bias
    x, cond, _ = batch()
    t, s = torch.full((4,), 499), torch.full((4,), 249)
    streaks = [
        float(adversary.judge(x, t, x.clone().requires_grad_(), x, s, cond, torch.Generator())[1]["discriminator_unbeaten_steps"])
        for _ in range(5)
    ]
    assert streaks == [0, 1, 1, 0, 0]


def test_the_discriminators_gradient_is_the_mean_over_the_passes(checkpoint):
    model, adapters, _, _ = build(checkpoint, CONFIG)
    x, cond, _ = batch()
    t, s = torch.full((4,), 499), torch.full((4,), 249)
    found = []
    for passes in (1, 2):
        adversary = Adversary(adapters, CONFIG.adversarial, model.schedule, segments=2, passes=passes, seed=0, device=CPU)
        for part in torch.arange(4).chunk(passes):
            prediction = (x[part] - 1).requires_grad_()
            adversary.judge(x[part], t[part], prediction, x[part] + 1, s[part], cond[part], torch.Generator())
        found.append([p.grad for p in adversary.head.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_pcms_loss_by_hand(checkpoint):
    """Huber and 0.1 softplus(-logit), without balance, of samples noised to a shared time between s and s + T / k, by the same noise."""
    config = variant(
        distance="huber", adversarial={**CONFIG.adversarial.model_dump(), "weight": 0.1, "balance": False, "pair": False, "renoise": True}
    )
    model, _, adversary, step = build(checkpoint, config)
    seen, judge, encode = {}, adversary.judge, adversary._encode

    def watched(x_t, t, prediction, target, s, cond, generator, features=None):
        seen.update(prediction=prediction, target=target, s=s, state=generator.get_state())
        return judge(x_t, t, prediction, target, s, cond, generator, features)

    adversary.judge = watched
    adversary._encode = lambda x, t, cond: seen.setdefault("encoded", []).append((x, t, cond)) or encode(x, t, cond)
    loss, _ = step(*batch(), torch.Generator().manual_seed(0))
    (x_real, t_real, cond), (x_fake, t_fake, _) = seen["encoded"]
    draws, s = torch.Generator(), seen["s"]
    draws.set_state(seen["state"])
    t_star = (s + (torch.rand(len(s), generator=draws) * 500).long()).clamp(max=999)
    z = torch.randn(x_real.shape, generator=draws)
    assert torch.equal(t_real, t_star) and torch.equal(t_fake, t_star) and (t_star > s).any()
    alphas, sigmas = model.schedule.alphas, model.schedule.sigmas
    ratio = (alphas[t_star] / alphas[s]).view(-1, 1, 1, 1)
    more = (sigmas[t_star].view(-1, 1, 1, 1) ** 2 - ratio**2 * sigmas[s].view(-1, 1, 1, 1) ** 2).clamp(min=0).sqrt()
    torch.testing.assert_close(x_real, (ratio * seen["target"] + more * z).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_fake, (ratio * seen["prediction"] + more * z).float(), rtol=1e-4, atol=1e-5)
    difference = seen["prediction"] - seen["target"]
    huber = ((difference**2 + 1e-6).sqrt() - 1e-3).mean()
    logits = adversary.head(encode(x_fake, t_star, cond))
    assert loss.item() == pytest.approx((huber + 0.1 * torch.log1p(torch.exp(-logits)).mean()).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 5.0),
        ({"teacher": "previous_stage"}, 4.0),
        ({"gradient_checkpointing": True}, 6.0),
        ({"segments": 8, "starts": "segment_ends", "ends": "segment_start", "target": "solver"}, 12.0),  # five guided steps, student twice
        ({"segments": 4, "solver_points": 8, "teacher": "previous_stage", "target": "solver"}, 4.0),  # two steps, student twice
        ({"judged": {"encoder": "adapter"}, "teacher": "previous_stage"}, 4 + 7 * 0.35),  # three points there and back, once more back
        ({"judged": {"encoder": "frozen"}, "teacher": "previous_stage"}, 4 + 4 * 0.35),
        ({"judged": {"encoder": "frozen"}, "gradient_checkpointing": True}, 6 + 4 * 0.35),
        ({"judged": {"pair": False}}, 5 + 3 * 0.35),
    ],
)
def test_what_a_step_ideally_costs(changes, expected):
    judged = changes.pop("judged", {"weight": 0.0})
    config = variant(adversarial={**CONFIG.adversarial.model_dump(), **judged}, **changes)
    assert ideal_forwards(config, 0.35) == pytest.approx(expected)


def test_the_reports_cost_by_hand():
    config = variant(adversarial={}, loop={**CONFIG.loop.model_dump(), "accumulate": 4})
    report = {"mean_step_seconds": 3.0, "unet_forward_seconds": 0.1, "encoder_share": 0.4}  # of a pass: a quarter of an update
    costed = with_cost(report, config)
    assert costed["step_forwards"] == pytest.approx(7.5) and costed["step_over_ideal"] == pytest.approx(1.5)
    assert with_cost({"encoder_share": 0.4}, config) == {"encoder_share": 0.4}  # nothing was trained


def test_alarm_for_an_unbeaten_discriminator(checkpoint, caplog):
    """With targets and predictions that differ by a constant the head learns to be always right; the count starts anew when it errs."""
    _, _, adversary, _ = build(checkpoint, with_adversarial(alarm_after=3))
    x, cond, _ = batch()
    t, s = torch.full((4,), 499), torch.full((4,), 249)
    optimizer = torch.optim.Adam(adversary.parameters, lr=0.01)
    counts = []
    for _ in range(40):
        prediction = (x - 3).requires_grad_()
        _, scalars = adversary.judge(x, t, prediction, x + 3, s, cond, torch.Generator())
        optimizer.step()
        optimizer.zero_grad()
        counts.append(float(scalars["discriminator_unbeaten_steps"]))
    assert counts[-1] >= 3 and counts[-1] == counts[-2] + 1
    with caplog.at_level(logging.WARNING):
        adversary.watch({"discriminator_unbeaten_steps": 2.0}, 5)
        assert not caplog.records
        adversary.watch({"discriminator_unbeaten_steps": counts[-1]}, 40)
    assert "right about everything" in caplog.text and "lower adversarial.learning_rate" in caplog.text
    adversary.judge(x, t, (x + 3).requires_grad_(), x - 3, s, cond, torch.Generator())  # the other way round it is always wrong
    assert adversary.streak == 0
