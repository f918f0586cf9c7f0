"""The hybrid distance: who gets a gradient, the weight as a share, exact resume, alarms, and checkpointing."""

import logging

import pytest
import stages
import tiny
import torch
from stages import CPU, generator
from worlds import prepare

from hypersd_pipeline.io import LoRADataset
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.objectives import adversarial, consistency
from hypersd_pipeline.recipes.distil import distil, make_adapters
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import StageConfig, changed
from hypersd_pipeline.training.cost import ideal_forwards
from hypersd_pipeline.training.stage import build_stage
from hypersd_pipeline.training.terms.adversarial import AdversarialConfig, Adversary
from hypersd_pipeline.training.terms.regression import Regression

CONFIG = StageConfig(
    terms={"consistency": {"segments": 2, "guidance": (3.0, 5.0)}, "adversarial": {"weight": 0.5, "hidden": 32}},
    lora=stages.LORA,
    loop={"steps": 4, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "checkpoint_every": 2},
)
GAN = AdversarialConfig(weight=0.5, pair=False, renoise=True, hidden=32)


def with_adversarial(**changes):
    return changed(CONFIG, terms={"adversarial": changes})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("sd15"))))


def build(checkpoint, config):
    model = load_teacher(checkpoint, parts=("backbone",))
    adapters = make_adapters(model, config)
    stages.moved(adapters, "student", seed=1)
    context = stages.context(adapters, stages.rows(), segments=config.consistency.segments)
    return model, adapters, build_stage(config, context, ready=lambda: adapters.use("student"))


def gradients(checkpoint, config):
    _, adapters, stage = build(checkpoint, config)
    loss, scalars = stage(generator())
    loss.backward()
    return loss, scalars, adapters, stage.adversary


def points(n=4):
    """Latents with their times and conditioning."""
    data = stages.rows(n)
    return data.latents, data.cond, torch.full((n,), 499), torch.full((n,), 249)


def new_adversary(adapters, config=CONFIG.adversarial, passes=1, segments=2):
    return Adversary(adapters, config, latent_shape=(4, 8, 8), segments=segments, passes=passes, seed=0, device=CPU)


@pytest.mark.parametrize(("encoder", "teacher"), [("frozen", "base"), ("adapter", "base"), ("frozen", "previous_stage")])
def test_who_gets_a_gradient(checkpoint, encoder, teacher):
    config = changed(CONFIG, terms={"adversarial": {"encoder": encoder}, "consistency": {"teacher": teacher}})
    _, _, adapters, adversary = gradients(checkpoint, config)
    student = {id(p) for p in adapters.parameters("student")}
    judge = {id(p) for p in adversary.parameters}
    assert all(p.grad is not None for p in adapters.parameters("student"))
    assert all(p.grad is not None for p in adversary.head.parameters())
    for name, parameter in adapters.backbone.module.named_parameters():
        if parameter.grad is not None:
            assert id(parameter) in student | judge, name  # not the base, not the averaged student
    if encoder == "adapter":
        pairs = adapters._pairs("discriminator")
        assert pairs and all(name.startswith(("down_blocks", "mid_block")) for name, _, _ in pairs)
        assert all(b.grad is not None and b.grad.abs().sum() > 0 for _, _, b in pairs)


def test_the_discriminators_gradient_is_its_own_loss_and_the_students_is_not(checkpoint):
    """Against plain autograd: the discriminator's loss through the head alone, the student's through everything but the head."""
    _, adapters, stage = build(checkpoint, with_adversarial(balance=False))
    captured, adversary = {}, stage.adversary
    judge = adversary.judge
    adversary.judge = lambda *a: captured.setdefault("inputs", a) and judge(*a)
    loss, _ = stage(generator())
    loss.backward()
    x_t, t, leaf, target, s, cond, _, seen = captured["inputs"]
    f_t, f_real, f_fake = (adapters.features(None, x, at, cond) for x, at in ((x_t, t), (target, s), (leaf, s)))
    assert torch.allclose(seen, f_t, atol=1e-5)  # taken from the teacher's own pass
    real, fake = adversary.head(torch.cat([f_real, f_t], 1)), adversary.head(torch.cat([f_fake, f_t], 1))
    wanted = torch.autograd.grad(adversarial.discriminator_loss(real, fake), list(adversary.head.parameters()), retain_graph=True)
    for parameter, gradient in zip(adversary.head.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)
    whole = consistency.mse(leaf, target) + 0.5 * adversarial.generator_loss(fake)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    (direction,) = torch.autograd.grad(whole, leaf)
    _, again, _ = build(checkpoint, changed(CONFIG, terms={"adversarial": None}))  # the same student, once more, without an adversary
    again.denoiser("student").jump(x_t, t, s, cond).backward(direction)
    for one, other in zip(adapters.parameters("student"), again.parameters("student"), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)


@pytest.mark.parametrize("encoder", ["frozen", "adapter"])
def test_the_students_graph_is_built_once(checkpoint, encoder):
    _, adapters, stage = build(checkpoint, with_adversarial(encoder=encoder))
    calls, middle = stages.passes(adapters), []
    adapters.backbone.feature_module().register_forward_hook(lambda module, inputs, output: middle.append(len(output)))
    loss, _ = stage(generator())
    loss.backward()
    assert calls == [(None, 8, False), ("ema", 4, False), ("student", 4, True)]  # teacher with both halves, target, student
    assert middle == [8, 4, 4, *((4, 4) if encoder == "frozen" else (8, 4))]  # target (with x_t), prediction
    assert ideal_forwards(with_adversarial(encoder=encoder), 0.35) == pytest.approx(5 + (3 if encoder == "frozen" else 7) * 0.35)


@pytest.mark.parametrize("encoder", ["frozen", "adapter"])
def test_gradient_checkpointing_gives_the_same_gradients(checkpoint, encoder):
    plain = gradients(checkpoint, with_adversarial(encoder=encoder))
    saved = gradients(checkpoint, changed(with_adversarial(encoder=encoder), gradient_checkpointing=True))
    for one, other in ((plain[2].parameters("student"), saved[2].parameters("student")), (plain[3].parameters, saved[3].parameters)):
        assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in zip(one, other, strict=True))


def test_balance_makes_the_weight_a_share(checkpoint, monkeypatch):
    """Whatever the scale of the head, its gradient at the prediction has the norm of the squared error's."""
    from hypersd_pipeline.training import stage as training

    norms = []
    scale = training.balanced

    def spy(gradient, reference, size, cap):
        norms.append((gradient.norm().item(), scale(gradient, reference).norm().item(), reference.norm().item()))
        return scale(gradient, reference)

    monkeypatch.setattr(training, "balanced", spy)
    for factor in (1.0, 100.0):
        _, _, stage = build(checkpoint, CONFIG)
        with torch.no_grad():
            stage.adversary.head.layers[-1].weight.mul_(factor)
        stage(generator())
    assert norms[1][0] > 5 * norms[0][0]
    assert norms[1][1] == pytest.approx(norms[1][2], rel=1e-4) and norms[0][1] == pytest.approx(norms[1][1], rel=1e-4)


def test_balance_makes_the_weight_a_share_of_a_samples_other_terms_too(checkpoint):
    x = stages.sample_batch().z
    given = stages.sample_batch(target=torch.zeros_like(x))

    def run(regression=0.0, judge=None, factor=1.0):
        terms = [(regression, Regression())] if regression else []
        if judge:
            adapters = make_adapters(load_teacher(checkpoint, parts=("backbone",)), CONFIG)
            adversary = new_adversary(adapters, judge, segments=1)
            with torch.no_grad():
                adversary.head.layers[-1].weight.mul_(factor)
            terms.append((judge.weight, adversary))
        return stages.at_the_sample(x, terms, given)[0]

    regression, alone = run(0.3), run(judge=GAN)
    both = run(0.3, GAN) - regression
    assert both.norm().item() == pytest.approx(0.5 * regression.norm().item(), rel=1e-3)
    torch.testing.assert_close(both / both.norm(), alone / alone.norm(), rtol=1e-3, atol=1e-5)
    unbalanced = GAN.model_copy(update={"balance": False})
    torch.testing.assert_close(run(0.3, unbalanced) - regression, alone, rtol=1e-3, atol=1e-7)
    scaled = run(0.3, GAN, factor=100.0) - regression
    assert scaled.norm().item() == pytest.approx(both.norm().item(), rel=1e-3)


def test_renoised_and_single_point_judgement(checkpoint):
    loss, scalars, _, adversary = gradients(checkpoint, with_adversarial(renoise=True, pair=False))
    assert torch.isfinite(loss) and 0 <= scalars["discriminator_accuracy"] <= 1
    assert all(p.grad is not None for p in adversary.parameters)


@pytest.fixture(scope="module")
def latents(checkpoint, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("latents"), checkpoint)


def test_discriminator_resumes_bit_for_bit(checkpoint, latents, tmp_path):
    teacher = checkpoint
    config = with_adversarial(encoder="adapter")

    def run(path, stream=lambda values, step: None):
        lora, report = distil(latents, teacher, config, Outputs(CheckpointStore(path), stream))
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
    _, adapters, _ = build(checkpoint, CONFIG)
    adversary = new_adversary(adapters, passes=2)
    answers = iter([5.0, -5.0, 5.0, -5.0, -5.0, 5.0, 5.0, -5.0, 5.0, -5.0])  # logits of real and fake: right, right. Wrong, right. Right
    adversary._logits = lambda features, seen: features[0].mean() * 0 + next(answers) + 0 * adversary.head.layers[-1].bias
    x, cond, t, s = points()
    streaks = [
        float(adversary.judge(x, t, x.clone().requires_grad_(), x, s, cond, torch.Generator())[1]["discriminator_unbeaten_steps"])
        for _ in range(5)
    ]
    assert streaks == [0, 1, 1, 0, 0]


def test_the_discriminators_gradient_is_the_mean_over_the_passes(checkpoint):
    _, adapters, _ = build(checkpoint, CONFIG)
    x, cond, t, s = points()
    found = []
    for passes in (1, 2):
        adversary = new_adversary(adapters, passes=passes)
        for part in torch.arange(4).chunk(passes):
            prediction = (x[part] - 1).requires_grad_()
            adversary.judge(x[part], t[part], prediction, x[part] + 1, s[part], cond[part], torch.Generator())
        found.append([p.grad for p in adversary.head.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_pcms_loss_by_hand(checkpoint):
    """Huber and 0.1 softplus(-logit), without balance, of samples noised to a shared time between s and s + T / k, by the same noise."""
    judge = {"weight": 0.1, "balance": False, "pair": False, "renoise": True}
    model, _, stage = build(checkpoint, changed(CONFIG, terms={"consistency": {"distance": "huber"}, "adversarial": judge}))
    adversary = stage.adversary
    seen, judge, encode = {}, adversary.judge, adversary._encode

    def watched(x_t, t, prediction, target, s, cond, generator, features=None):
        seen.update(prediction=prediction, target=target, s=s, state=generator.get_state())
        return judge(x_t, t, prediction, target, s, cond, generator, features)

    adversary.judge = watched
    adversary._encode = lambda x, t, cond: seen.setdefault("encoded", []).append((x, t, cond)) or encode(x, t, cond)
    loss, _ = stage(generator())
    (x_real, t_real, cond), (x_fake, t_fake, _) = seen["encoded"]
    draws, s = torch.Generator(), seen["s"]
    draws.set_state(seen["state"])
    t_star = (s + (torch.rand(len(s), generator=draws) * 500).long()).clamp(max=999)
    z = torch.randn(x_real.shape, generator=draws)
    assert torch.equal(t_real, t_star) and torch.equal(t_fake, t_star) and (t_star > s).any()
    alphas, sigmas = model.process.alphas, model.process.sigmas
    ratio = (alphas[t_star] / alphas[s]).view(-1, 1, 1, 1)
    more = (sigmas[t_star].view(-1, 1, 1, 1) ** 2 - ratio**2 * sigmas[s].view(-1, 1, 1, 1) ** 2).clamp(min=0).sqrt()
    torch.testing.assert_close(x_real, (ratio * seen["target"] + more * z).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x_fake, (ratio * seen["prediction"] + more * z).float(), rtol=1e-4, atol=1e-5)
    difference = seen["prediction"] - seen["target"]
    huber = ((difference**2 + 1e-6).sqrt() - 1e-3).mean()
    logits = adversary.head(*encode(x_fake, t_star, cond))
    assert loss.item() == pytest.approx((huber + 0.1 * torch.log1p(torch.exp(-logits)).mean()).item(), rel=1e-4)


def test_alarm_for_an_unbeaten_discriminator(checkpoint, caplog):
    """With targets and predictions that differ by a constant the head learns to be always right. The count starts anew when it errs."""
    _, _, stage = build(checkpoint, with_adversarial(alarm_after=3))
    adversary = stage.adversary
    x, cond, t, s = points()
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
        stage.watch({"discriminator_unbeaten_steps": 2.0}, 5)
        assert not caplog.records
        stage.watch({"discriminator_unbeaten_steps": counts[-1]}, 40)
    assert "right about everything" in caplog.text and "lower adversarial.learning_rate" in caplog.text
    adversary.judge(x, t, (x + 3).requires_grad_(), x - 3, s, cond, torch.Generator())  # the other way round it is always wrong
    assert adversary.streak == 0


def test_a_judge_that_takes_data_for_real(checkpoint):
    """On a trajectory ``real: data`` is the image at ``t_end`` with the noise of ``x_tn``. By default it is the target."""
    for real in ("target", "data"):
        _, _, stage = build(checkpoint, with_adversarial(real=real))
        rollout = stage.parts[0][0]
        batch = rollout.draw(generator())
        prediction = rollout.predict(batch, generator(1))
        if real == "target":
            assert batch.real is None and prediction.real is prediction.target
            continue
        assert prediction.real is batch.real and not torch.allclose(batch.real, prediction.target, atol=0.1)
        inner = batch.times.t_n < 999  # there x_tn is the image with the same noise, so both give the image
        process, times = rollout.process, batch.times
        assert inner.any()
        high = [process.alpha_sigma(t, batch.real) for t in (times.t_n, times.t_end)]
        (a_n, s_n), (a_e, s_e) = high
        z = (batch.x_tn - a_n / a_e * batch.real) / (s_n - a_n / a_e * s_e)
        x0 = (batch.real - s_e * z) / a_e
        nearest = torch.cdist(x0[inner].flatten(1).float(), stages.rows().latents.flatten(1)).min(dim=1).values
        assert (nearest < 0.05).all()


def test_the_student_listens_above_a_running_accuracy_only(checkpoint):
    silent, deaf = (gradients(checkpoint, with_adversarial(**changes)) for changes in ({"weight": 0.0}, {"listen_above": 0.9}))
    for one, other in zip(*(found[2].parameters("student") for found in (silent, deaf)), strict=True):
        assert torch.equal(one.grad, other.grad)  # the judge knows nothing yet
    adversary = deaf[3]
    assert adversary.heard == 0 and all(p.grad is not None for p in adversary.head.parameters())  # but it learns
    adversary.running = torch.tensor(0.95)
    assert adversary.heard == 1
    other = new_adversary(deaf[2], with_adversarial(listen_above=0.9).adversarial)
    other.load_state_dict(adversary.state_dict())
    assert other.heard == 1


@pytest.mark.parametrize("changes", [{"levels": 2}, {"norm": "none"}, {"loss": "hinge"}, {"loss": "relativistic"}])
def test_each_switch_of_the_judge_reaches_the_student_and_the_key(checkpoint, changes):
    usual, other = (gradients(checkpoint, config)[2] for config in (CONFIG, with_adversarial(**changes)))
    assert not all(
        torch.allclose(a.grad, b.grad, rtol=1e-3) for a, b in zip(*(x.parameters("student") for x in (usual, other)), strict=True)
    )
    (name,) = changes
    assert name not in CONFIG.identity()["terms"]["adversarial"]  # at its default it is no part of older keys
    assert with_adversarial(**changes).identity()["terms"]["adversarial"][name] == changes[name]


LEARNS = {"real": "data", "levels": 2, "norm": "none", "loss": "relativistic", "keep": True}


def test_the_discriminator_is_warm_before_the_student_moves(checkpoint):
    """It learns alone, on the student as it starts. The updates are counted in the checkpoint, so that a resumed stage has none again."""
    config = with_adversarial(**LEARNS, warmup_updates=5, learning_rate=0.01)
    _, adapters, stage = build(checkpoint, config)
    student = [p.clone() for p in adapters.parameters("student")]
    fresh = build(checkpoint, config)[2].adversary.head.state_dict()
    losses, judge = [], stage.adversary.judge
    stage.adversary.judge = lambda *a: losses.append(judge(*a)) or losses[-1]
    loss, _ = stage(generator())
    assert len(losses) == 6 and stage.adversary.warmed == 5 and stage.adversary.state_dict()["warmed"] == 5
    assert losses[4][1]["discriminator_loss"] < losses[0][1]["discriminator_loss"]
    for one, other in zip(student, adapters.parameters("student"), strict=True):
        assert torch.equal(one, other) and other.grad is None
    assert any(not torch.equal(fresh[name], tensor) for name, tensor in stage.adversary.head.state_dict().items())
    loss.backward()  # this is the student's first update
    assert all(p.grad is not None for p in adapters.parameters("student"))
    resumed = build(checkpoint, config)[2].adversary
    resumed.load_state_dict(stage.adversary.state_dict())
    assert not resumed.cold


def test_a_kept_discriminator_goes_on_in_the_next_stage(checkpoint, latents, tmp_path, caplog):
    """By the LoRA's folder, as between two nodes. The second stage's learning rate leaves the head where it started."""

    def trained(name, config, start=None):
        return distil(latents, checkpoint, config, Outputs(CheckpointStore(tmp_path / name), lambda values, step: None), start)[0]

    first = trained("k2", with_adversarial(**LEARNS))
    dataset = LoRADataset(filepath=str(tmp_path / "lora_k2"))
    dataset.save(first)
    start = dataset.load()
    assert start.judge.keys() == first.judge.keys() != set()
    still = {**LEARNS, "learning_rate": 1e-12}
    second = trained("k1", with_adversarial(**still), start)
    for name, tensor in second.judge.items():
        torch.testing.assert_close(tensor, first.judge[name], rtol=1e-4, atol=1e-6)
    anew = trained("anew", with_adversarial(**{**still, "keep": False}), start)
    assert anew.judge == {}
    with caplog.at_level(logging.WARNING):
        wider = trained("wider", with_adversarial(**still, hidden=64), start)
    assert "starts anew" in caplog.text and wider.judge.keys() == first.judge.keys()
    with pytest.raises(ValueError, match="keep: the head alone goes on"):
        with_adversarial(keep=True, encoder="adapter")
