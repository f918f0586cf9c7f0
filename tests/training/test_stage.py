"""A stage: one graph of the student a prediction, all batches drawn before any network runs, and what a checkpoint holds."""

import pytest
import stages
import tiny
import torch
from stages import generator

from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.recipes.distil import make_adapters
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.critic import Critic
from hypersd_pipeline.training.rollouts import Samples, Trajectory
from hypersd_pipeline.training.stage import build_stage, carried

CONSISTENCY = {"segments": 1, "guidance": (3.0, 5.0), "batch": 3}
MATCHING = {"guidance": (3.0, 3.0), "critic": {"updates": 1}}
GAN = {"weight": 0.5, "pair": False, "renoise": True, "hidden": 32}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("stage"))))


def build(teacher, terms, data=None, checkpointing=False, **more):
    config = StageConfig(terms=terms, gradient_checkpointing=checkpointing, lora=stages.LORA, loop=stages.LOOP, **more)
    model = load_teacher(teacher, parts=("backbone",))
    adapters = make_adapters(model, config)
    stages.moved(adapters, "student", *(name for name in adapters.names if name == "critic"))
    context = stages.context(adapters, data or stages.rows(), batch=2, pairs=stages.pairs())
    return adapters, build_stage(config, context, ready=lambda: adapters.use("student"))


@pytest.mark.parametrize(
    ("terms", "predictions"),
    [
        ({"matching": MATCHING, "regression": {}}, 1),
        ({"matching": MATCHING, "regression": {}, "adversarial": GAN}, 1),
        ({"consistency": CONSISTENCY, "adversarial": {"weight": 0.5, "hidden": 32}}, 1),
        ({"consistency": CONSISTENCY, "adversarial": {"weight": 0.5, "hidden": 32, "encoder": "adapter"}}, 1),
        ({"consistency": CONSISTENCY, "matching": MATCHING, "regression": {}, "adversarial": GAN}, 2),
    ],
)
def test_the_graph_is_cut_once(teacher, terms, predictions):
    """However many terms judge a prediction, the student's network runs forward once and backward once."""
    adapters, stage = build(teacher, terms)
    calls, backwards = stages.passes(adapters), []

    def watch(module, inputs, output):
        if calls[-1][0] == "student" and torch.is_grad_enabled():
            output[0].register_hook(lambda gradient: backwards.append(len(gradient)))

    adapters.backbone.module.register_forward_hook(watch)
    first = adapters.parameters("student")[0]
    reached = []
    first.register_hook(lambda gradient: reached.append(1))
    loss, _ = stage(generator())
    assert backwards == [] and reached == []  # judging goes no further than the prediction
    loss.backward()
    assert len([call for call in calls if call[0] == "student" and call[2]]) == predictions == len(backwards)
    assert len(reached) == 1 and all(p.grad is not None for p in adapters.parameters("student"))


def test_the_loss_and_its_gradient_are_those_of_the_weighed_sum(teacher):
    """Against plain autograd, without a cut: a trajectory and a sample, with two terms that have no opponent."""
    adapters, stage = build(teacher, {"consistency": {**CONSISTENCY, "weight": 0.7}, "regression": {"weight": 0.3}})
    loss, scalars = stage(generator())
    loss.backward()
    found = [p.grad.clone() for p in adapters.parameters("student")]
    for parameter in adapters.parameters("student"):
        parameter.grad = None
    g = generator()
    batches = [rollout.draw(g) for rollout, _ in stage.parts]
    one, other = (rollout.predict(batch, g) for (rollout, _), batch in zip(stage.parts, batches, strict=True))
    distance, regression = ((p.sample - p.target).square().mean() for p in (one, other))
    whole = 0.7 * distance + 0.3 * regression
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    assert scalars["distance"].item() == pytest.approx(distance.item(), rel=1e-5)
    assert scalars["regression"].item() == pytest.approx(regression.item(), rel=1e-5)
    for gradient, parameter in zip(found, adapters.parameters("student"), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_adversarys_gradient_has_a_share_of_all_other_terms_together(teacher, monkeypatch):
    from hypersd_pipeline.training import stage as training

    references = []
    monkeypatch.setattr(training, "balanced", lambda gradient, reference, size, cap: references.append(reference.clone()) or gradient)
    _, stage = build(teacher, {"matching": {**MATCHING, "weight": 0.7}, "regression": {"weight": 0.3}, "adversarial": GAN})
    seen = []
    for _, terms in stage.parts:
        for i, (weight, term) in enumerate(terms[:2]):
            terms[i] = (weight, lambda view, g, term=term, weight=weight: seen.append((weight, term(view, g), view.sample)) or seen[-1][1])
    stage(generator())
    assert [weight for weight, *_ in seen] == [0.7, 0.3] and seen[0][2] is seen[1][2]
    leaf, z = seen[0][2], stages.pairs()
    regression = 2 * 0.3 * (leaf - z.target[torch.randint(8, (2,), generator=generator())]) / leaf.numel()
    (reference,) = references
    matching = (reference - regression).detach()
    assert matching.norm() == pytest.approx(0.7 * float(seen[0][1][1]["matching"]) / leaf.numel() ** 0.5, rel=1e-3)


class Watched(stages.Rows):
    """Rows that say when they are asked."""

    def __init__(self, events):
        rows = stages.rows()
        super().__init__(rows.latents, rows.cond, rows.uncond)
        self.events = events

    def conditioning(self, indices, generator=None):
        self.events.append("drawn")
        return super().conditioning(indices, generator)


def test_both_batches_are_drawn_before_the_first_network_is_called(teacher):
    events = []
    adapters, stage = build(teacher, {"matching": MATCHING, "consistency": CONSISTENCY}, Watched(events))
    for module in (adapters.backbone.module, adapters.backbone.feature_module()):
        module.register_forward_pre_hook(lambda module, inputs: events.append("called"))
    drawn = []
    for rollout, _ in stage.parts:
        draw = rollout.draw
        rollout.draw = lambda g, draw=draw: drawn.append(draw(g)) or drawn[-1]
    stage(generator(3))
    assert events[:2] == ["drawn", "drawn"] and set(events[2:]) == {"called"}
    assert [type(rollout) for rollout, _ in stage.parts] == [Trajectory, Samples]
    g = generator(3)  # one generator, one batch after the other, and nothing between
    one, other = (type(rollout).draw(rollout, g) for rollout, _ in stage.parts)
    assert torch.equal(drawn[0].x_tn, one.x_tn) and torch.equal(drawn[0].guidance, one.guidance)
    assert torch.equal(drawn[1].z, other.z) and torch.equal(drawn[1].target, other.target)


def test_gradient_checkpointing_gives_the_same_gradients_with_two_predictions(teacher):
    terms = {"consistency": CONSISTENCY, "matching": MATCHING, "adversarial": GAN}
    found = []
    for checkpointing in (False, True):
        adapters, stage = build(teacher, terms, checkpointing=checkpointing)
        stage(generator())[0].backward()
        found.append([p.grad for p in [*adapters.parameters("student"), *stage.adversary.parameters]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_checkpoint_holds_the_opponents(teacher):
    _, plain = build(teacher, {"consistency": CONSISTENCY})
    assert plain.state() == {} and plain.companions() == {} and plain.adversary is None
    plain.watch({"discriminator_unbeaten_steps": 1e6}, 1)  # nobody to be watched
    _, stage = build(teacher, {"consistency": CONSISTENCY, "matching": MATCHING, "adversarial": GAN})
    assert set(stage.state()) == {"critic", "discriminator"} and isinstance(stage.state()["critic"], Critic)
    assert stage.companions() == {"discriminator": stage.adversary.optimizer}  # the critic steps by itself


def test_a_carried_value_has_the_gradient_that_is_carried():
    output = torch.randn(2, 3, requires_grad=True)
    gradient = torch.randn(2, 3)
    loss = carried(output, gradient, torch.tensor(4.2))
    loss.backward()
    assert loss.item() == pytest.approx(4.2) and torch.equal(output.grad, gradient)


def test_the_norm_of_each_terms_gradient_is_measured_where_it_is_asked_for(teacher):
    """By hand at the cut: of the weighted squared error, and of the judge, which is brought to its norm and has a weight of a half."""
    terms = {"consistency": {**CONSISTENCY, "weight": 0.7}, "adversarial": {"weight": 0.5, "hidden": 32}}
    found = []
    for observed in (False, True):
        adapters, stage = build(teacher, terms)
        ((rollout, _),) = stage.parts
        predict, seen = rollout.predict, []
        rollout.predict = lambda batch, g, predict=predict, seen=seen: seen.append(predict(batch, g)) or seen[-1]
        stage.observe(observed)
        loss, scalars = stage(generator())
        loss.backward()
        found.append((loss, [p.grad for p in adapters.parameters("student")], scalars, seen[0]))
    (loss, gradients, plain, _), (other_loss, other_gradients, scalars, prediction) = found
    assert torch.equal(loss, other_loss) and all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))
    assert set(scalars) - set(plain) == {"gradient_consistency", "gradient_adversarial"}
    difference = prediction.sample.detach() - prediction.target
    assert float(scalars["gradient_consistency"]) == pytest.approx(float(0.7 * 2 * difference.norm() / difference.numel()), rel=1e-4)
    assert float(scalars["gradient_adversarial"]) == pytest.approx(0.5 * float(scalars["gradient_consistency"]), rel=1e-4)


def test_terms_that_see_images_have_one_norm_together(teacher):
    """It is what the other terms leave of the whole gradient, so that nobody walks back through the decoder twice."""
    model = load_teacher(teacher, parts=("vae",))
    reward = {"kind": "reward", "reward": {"kind": "shipped_quality"}, "alpha": 100.0, "weight": 0.1}
    config = StageConfig(terms={"quality": reward, "regression": {}}, lora=stages.LORA, loop=stages.LOOP)
    adapters = make_adapters(load_teacher(teacher, parts=("backbone",)), config)
    context = stages.context(adapters, stages.rows(), batch=2, pairs=stages.pairs(), decode=lambda x: model.decode(x, clip=False))
    alone = {}
    for left_out in (None, "regression", "quality"):
        terms = {name: term.model_copy(update={"weight": 0.0 if name == left_out else term.weight}) for name, term in config.terms.items()}
        stage = build_stage(config.model_copy(update={"terms": terms}), context)
        stage.observe(True)
        alone[left_out] = stage(generator())[1]
    assert float(alone[None]["gradient_images"]) == pytest.approx(float(alone["regression"]["gradient_images"]), rel=1e-3)
    assert float(alone[None]["gradient_regression"]) == pytest.approx(float(alone["quality"]["gradient_regression"]), rel=1e-3)
    assert "gradient_regression" not in alone["regression"] and "gradient_images" not in alone["quality"]
