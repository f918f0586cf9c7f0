"""Aesthetic feedback: who gets a gradient, from which images, and through which decoder."""

import pytest
import stages
import tiny
import torch
from stages import at_the_sample, generator, sample_batch, sampled

from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.rewards import load_reward
from hypersd_pipeline.rewards.base import straight_through_clamp
from hypersd_pipeline.rewards.shipped_quality import ShippedQualityConfig
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.stage import build_stage
from hypersd_pipeline.training.terms.reward import RewardTerm


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("reward"))))


class Brightness:
    """The mean of the pixels, clipped straight-through as every reward must."""

    name = "brightness"

    def score(self, images, prompts):
        assert len(prompts) == len(images)
        return straight_through_clamp(images).mean(dim=(1, 2, 3))


def judged(x, alpha, weight=2.0):
    given = sample_batch(len(x), prompts=["a fox"] * len(x))
    return at_the_sample(x, [(weight, RewardTerm(Brightness(), alpha))], given, decode=lambda latents: latents[:, :3] + 0.5)


def test_a_saturated_image_still_gets_the_rewards_gradient():
    gradient, loss, scalars = judged(torch.full((2, 4, 8, 8), 5.0), alpha=1.5)
    assert scalars["reward_brightness"].item() == pytest.approx(1.0)  # as if clipped
    assert loss.item() == pytest.approx(2.0 * 0.5)
    assert torch.allclose(gradient[:, :3], torch.tensor(-2.0 / (2 * 3 * 64))) and not gradient[:, 3].any()


def test_a_good_enough_image_gets_no_gradient():
    x = torch.full((2, 4, 8, 8), 0.2)
    x[1] = -0.2  # brightness 0.7 and 0.3
    gradient, loss, _ = judged(x, alpha=0.5)
    assert not gradient[0].any() and gradient[1, :3].all()
    assert loss.item() == pytest.approx(2.0 * 0.2 / 2, rel=1e-4)
    assert not judged(x, alpha=0.1)[0].any()


def test_images_are_decoded_once_for_all_rewards():
    decoded = []
    terms = [(1.0, RewardTerm(Brightness(), 1.5)), (0.5, RewardTerm(Brightness(), 2.0))]
    decode = lambda latents: decoded.append(1) or latents[:, :3]  # noqa: E731
    _, loss, _ = at_the_sample(torch.zeros(2, 4, 8, 8), terms, sample_batch(prompts=["", ""]), decode)
    assert decoded == [1] and loss.item() == pytest.approx(1.5 + 0.5 * 2.0)
    with pytest.raises(ValueError, match="built without a decoder"):
        at_the_sample(torch.zeros(2, 4, 8, 8), terms)


def test_the_shipped_reward_through_the_tiny_decoder(teacher):
    """Decoded far outside of [0, 1], every sample is still pulled."""
    model = load_teacher(teacher, parts=("vae",))
    quality = load_reward(ShippedQualityConfig(kind="shipped_quality"))
    given = sample_batch(prompts=["a fox", "an owl"])
    decode = lambda latents: 0.5 + 100 * (model.decode(latents, clip=False) - 0.5)  # noqa: E731  # a tiny random decoder is all grey
    with torch.no_grad():
        assert ((decode(given.z) - 0.5).abs() > 0.5).float().mean() > 0.9
    gradient, _, scalars = at_the_sample(given.z, [(1.0, RewardTerm(quality, 100.0))], given, decode)
    assert "reward_shipped_quality" in scalars
    assert (gradient.abs().sum(dim=(1, 2, 3)) > 0).all() and torch.isfinite(gradient).all()
    assert all(p.grad is None for p in [*model.vae.parameters(), *quality.parameters()])


def test_a_good_enough_reward_leaves_no_gradient(teacher):
    model = load_teacher(teacher, parts=("backbone", "vae"))
    adapters = AdaptedBackbone(model.backbone, model.process, **stages.LORA, names=("feedback",), trainable=("feedback",))
    stages.moved(adapters, "feedback")
    term = {"reward": {"kind": "shipped_quality"}, "alpha": -100.0}
    config = StageConfig(terms={"reward": term}, sample={"steps": 4, "gradient_steps": 2}, lora=stages.LORA, loop=stages.LOOP)
    decode = lambda latents: model.decode(latents, clip=False)  # noqa: E731
    context = stages.context(adapters, stages.rows(), 2, "feedback", decode=decode)
    loss, _ = sampled(build_stage(config, context), sample_batch(prompts=["a fox", "an owl"]))(generator())
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in adapters.parameters("feedback"))
