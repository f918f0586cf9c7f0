"""The stages of sd15 and sdxl move: with their rates, ranks and terms, on the shipped teacher, with small batches and few updates.

A LoRA starts at zero, and AdamW moves each of its weights by about the learning rate in an update. A rate that suits a whole UNet leaves a
LoRA where it is. The floors are relative changes of the network's output after as many updates as the environment has.
Ten updates tell it: the change of a LoRA from zero grows about in proportion to the number of updates.
"""

import pytest
import stages
import torch
from stages import CPU, generator

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig, StageConfig, changed
from hypersd_pipeline.training.critic import CRITIC, Critic
from hypersd_pipeline.training.loop import make_optimizer
from hypersd_pipeline.training.stage import build_stage
from hypersd_pipeline.training.terms import Context

UPDATES = 10
ENVIRONMENTS = ("sd15", "sdxl")


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def values(request):
    return stages.parameters(request.param)


@pytest.fixture(scope="module")
def prompts():
    """Eight prompts in the shipped teacher's words."""
    teacher = load_teacher(TeacherConfig(), parts=("text",), device="cpu")
    with torch.no_grad():
        return teacher.encode_prompts([f"a {thing}" for thing in ("cat", "dog", "red apple", "tree", "house", "car", "bird", "fish")])


class Scenes(stages.Rows):
    """Rows for the shipped teacher."""

    def __init__(self, shape: tuple[int, int, int], cond: Conditioning) -> None:
        super().__init__(torch.randn(len(cond), *shape, generator=generator(3)), cond, cond[torch.tensor([0])])


def build(lora, cond, *fresh, ranks=None):
    model = load_teacher(TeacherConfig(), parts=("backbone",), device="cpu")
    adapters = AdaptedBackbone(
        model.backbone, model.process, rank=lora.rank, target_modules=lora.target_modules, trainable=("student", *fresh),
        fresh_names=fresh, ranks=ranks,
    )  # fmt: skip
    return model, adapters, Scenes(model.latent_shape, cond)


def change(adapters, name, data):
    """How far the adapter's output is from the base's, relative to it."""
    x, t = torch.randn(8, *data.latent_shape, generator=generator(5)), torch.linspace(100, 999, 8).long()
    with torch.no_grad():
        base, moved = (adapters.denoiser(which).network(x, t, data.cond) for which in (None, name))
    return float((moved - base).norm() / base.norm())


def context(model, adapters, data, batch=2, **more):
    return Context(
        adapters, adapters.denoiser("student"), adapters.denoiser(None), data, model.latent_shape, batch=batch, device=CPU, **more
    )


def trained(stage, parameters, loop, updates=UPDATES):
    optimizer, g = make_optimizer(parameters, loop), generator()
    for _ in range(updates):
        loss, scalars = stage(g)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, loop.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        for companion in stage.companions().values():
            companion.step()
            companion.zero_grad()
    return scalars


def test_the_critic_leaves_the_teacher_in_its_warm_up(values, prompts):
    """After a tenth of the warm-up. At 1e-6, the rate of a whole UNet, it does not."""
    config = OneStepConfig(**values["dmd"]["stage"]).terms["matching"].critic
    lora = OneStepConfig(**values["dmd"]["stage"]).lora
    found = {}
    for rate in (config.learning_rate, 1e-6):
        _, adapters, data = build(lora, prompts, CRITIC, ranks={CRITIC: config.rank})
        critic = Critic(adapters, config.model_copy(update={"learning_rate": rate}))
        g = generator()
        for _ in range(config.warmup_updates // 10):
            critic.warm_up(data.latents[:4], data.cond[:4], g)
        found[rate] = change(adapters, CRITIC, data)
    assert found[config.learning_rate] > 0.005 > 10 * found[1e-6], found


def test_the_feedback_lora_moves(values, prompts):
    """With the anchor's and the rewards' weights, but the packaged reward, since the published ones take gigabytes."""
    written = values["feedback"]["stage"]
    reward = {"kind": "reward", "reward": {"kind": "shipped_quality"}, "alpha": 100.0, "weight": written["terms"]["image_reward"]["weight"]}
    config = FeedbackConfig(**{**written, "terms": {"anchor": written["terms"]["anchor"], "quality": reward}})
    model, adapters, data = build(config.lora, prompts)
    vae = load_teacher(TeacherConfig(), parts=("vae",), device="cpu")
    stage = build_stage(config, context(model, adapters, data, decode=lambda latents: vae.decode(latents, clip=False)))
    trained(stage, adapters.parameters("student"), config.loop)
    assert change(adapters, "student", data) * config.loop.steps / UPDATES > 0.05
    assert config.loop.steps * config.loop.learning_rate >= 0.01  # how far a weight of B can go: weights of Stable Diffusion are .02 to .05


def test_the_students_move(values, prompts):
    """TSCD's last stage with its judge, and the one-step stage with a warm critic."""
    tscd = StageConfig(**values["tscd_k1"]["stage"])
    model, adapters, data = build(tscd.lora, prompts)
    stage = build_stage(tscd, context(model, adapters, data, segments=1))
    scalars = trained(stage, adapters.parameters("student"), tscd.loop)
    assert change(adapters, "student", data) * tscd.loop.steps / UPDATES > 0.05
    assert {"distance", "discriminator_loss"} <= set(scalars)

    written = OneStepConfig(**values["dmd"]["stage"])
    one_step = changed(
        written,
        terms={"regression": {"weight": 0}, "laion_aesthetic": {"weight": 0}, "image_reward": {"weight": 0},
               "matching": {"critic": {"warmup_updates": 3}}, "consistency": {"batch": 2}},
    )  # fmt: skip
    model, adapters, data = build(one_step.lora, prompts, CRITIC, ranks={CRITIC: one_step.terms["matching"].critic.rank})
    stage = build_stage(one_step, context(model, adapters, data, passes=5))
    scalars = trained(stage, adapters.parameters("student"), one_step.loop, updates=5)
    assert change(adapters, "student", data) * one_step.loop.steps / 5 > 0.05
    assert scalars["critic_skipped"] == 0 and stage.state()["critic"].warmed == 3
