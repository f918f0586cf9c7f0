"""Feedback: who gets a gradient from which term, the hinge, the grid that is walked, and the sum of two LoRAs in diffusers."""

import pytest
import tiny
import torch
from diffusers import DDIMScheduler

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.schedule import Schedule, ddim
from hypersd_pipeline.models.adapters import AdaptedUNet
from hypersd_pipeline.models.lora import LoRA, combine, merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.objectives import feedback
from hypersd_pipeline.perception.config import SmallSoloConfig
from hypersd_pipeline.perception.protocol import Instances, LabelMap
from hypersd_pipeline.perception.solo import new_small_solo
from hypersd_pipeline.rewards import load_reward
from hypersd_pipeline.rewards.shipped_quality import ShippedQualityConfig
from hypersd_pipeline.training.feedback import STUDENT, Annotated, FeedbackStep, JudgementConfig, RewardTerm, decoded_one_by_one

TARGETS = ("to_q", "to_v", "conv1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_sd15(tmp_path_factory.mktemp("feedback"))


class Brightness:
    """A perceptual model that can be written out: the mean squared distance of the pixels inside the masks from white."""

    name = "brightness"

    def loss(self, images, instances):
        return torch.stack([(images[i][:, item.masks.any(0)] - 1).square().mean() for i, item in enumerate(instances)]).mean()


def build(folder, config, perceptual=None, rewards=None):
    model = load_teacher(TeacherConfig(source=str(folder)))
    adapters = AdaptedUNet(model.unet, rank=2, target_modules=TARGETS, names=(STUDENT,), trainable=(STUDENT,))
    quality = load_reward(ShippedQualityConfig(kind="shipped_quality"))
    terms = [RewardTerm(quality, alpha=100.0, weight=1.0)] if rewards is None else rewards(quality)
    decode = lambda latents: model.decode(latents, clip=False)  # noqa: E731
    return model, adapters, FeedbackStep(adapters, config, model.schedule, model.prediction_type, decode, terms, perceptual)


def inputs(n=2):
    generator = torch.Generator().manual_seed(1)
    cond = Conditioning(torch.randn(n, 5, 32, generator=generator))
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, 10:30, 10:30] = True
    real = Annotated(torch.randn(n, 4, 8, 8, generator=generator), cond, [Instances(mask, torch.zeros(1, dtype=torch.int64))] * n)
    return torch.randn(n, 4, 8, 8, generator=generator), cond, ["a fox", "an owl"], real


def moved(adapters, scale=0.05):
    with torch.no_grad():
        for parameter in adapters.parameters(STUDENT):
            parameter.add_(scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("term", ["reward", "perceptual", "anchor"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_term_reaches_the_feedback_adapter_and_nothing_else(folder, term, checkpointing):
    config = JudgementConfig(
        anchor_weight=float(term == "anchor"), perceptual_weight=float(term == "perceptual"), decode_checkpointing=checkpointing
    )
    model, adapters, step = build(folder, config, Brightness(), None if term == "reward" else lambda quality: [])
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.unet.train()
    moved(adapters)
    noise, cond, prompts, real = inputs()
    loss, scalars = step(noise, cond, prompts, real if term == "perceptual" else None, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapters.parameters(STUDENT))
    assert sum(float(p.grad.abs().sum()) for p in adapters.parameters(STUDENT)) > 0
    student = {id(p) for p in adapters.parameters(STUDENT)}
    assert all(p.grad is None for p in [*model.unet.parameters(), *model.vae.parameters()] if id(p) not in student)
    assert set(scalars) == {"anchor"} | ({"reward_shipped_quality"} if term == "reward" else set()) | (
        {"perceptual"} if term == "perceptual" else set()
    )


@pytest.mark.parametrize(
    ("steps", "gradient_steps", "perceptual_steps", "expected"),
    [
        (4, 2, None, {(499, 249)}),  # from half of the way, as UniFL, and never from noise without a picture
        (4, 2, 3, {(749, 499), (749, 249)}),
        (8, 3, None, {(499, 374), (499, 249), (499, 124)}),
        (4, 2, 1, {(249, 249)}),
        (1, 2, None, {(999, 999)}),
    ],
)
def test_where_a_noised_real_picture_starts_and_is_judged(folder, monkeypatch, steps, gradient_steps, perceptual_steps, expected):
    """The gradient's step is later than the start, where there is a later one, and one of the last."""
    from hypersd_pipeline.training import feedback as training

    config = JudgementConfig(steps=steps, gradient_steps=gradient_steps, perceptual_steps=perceptual_steps)
    _, _, step = build(folder, config, Brightness(), lambda quality: [])
    starts, ends = [], []
    noised = training.add_noise
    monkeypatch.setattr(training, "add_noise", lambda x, z, t, schedule: starts.append(int(t[0])) or noised(x, z, t, schedule))
    monkeypatch.setattr(feedback, "advance", lambda student, x, timesteps, cond, *more: ends.append(timesteps[-1]) or x)
    for seed in range(12):
        step._perceive(step.perceptual, inputs()[3], torch.Generator().manual_seed(seed))
    assert set(zip(starts, ends, strict=True)) == expected


def test_a_start_before_the_grid_is_refused():
    with pytest.raises(ValueError, match="perceptual_steps is 5, more than the 4 steps of the grid"):
        JudgementConfig(steps=4, perceptual_steps=5)


@pytest.mark.parametrize("variant", ["solo", "solov2"])
def test_solos_gradient_reaches_the_feedback_adapter_and_nothing_else(folder, variant):
    """mmdet's own network, of random weights."""
    solo = new_small_solo(SmallSoloConfig(variant=variant, input_size=64, base_channels=8, feat_channels=16), LabelMap(), seed=0)
    model, adapters, step = build(folder, JudgementConfig(anchor_weight=0), solo, lambda quality: [])
    moved(adapters)
    noise, cond, prompts, real = inputs()
    loss, scalars = step(noise, cond, prompts, real, torch.Generator().manual_seed(0))
    loss.backward()
    student = adapters.parameters(STUDENT)
    assert scalars["perceptual"] > 0 and all(p.grad is not None and torch.isfinite(p.grad).all() for p in student)
    assert sum(float(p.grad.abs().sum()) for p in student) > 0
    ours = {id(p) for p in student}
    assert all(p.grad is None for p in [*model.unet.parameters(), *model.vae.parameters(), *solo.parameters()] if id(p) not in ours)


def test_decoding_again_gives_the_same_pictures_and_gradients(folder):
    model = load_teacher(TeacherConfig(source=str(folder)), parts=("vae",))
    decode, found = lambda z: model.decode(z, clip=False), []
    for draw in (lambda z: torch.cat([decode(one) for one in z.split(1)]), lambda z: decoded_one_by_one(decode, z)):
        z = inputs()[0].requires_grad_()
        images = draw(z)
        images.square().mean().backward()
        found.append((images.detach(), z.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_feedback_the_anchor_is_zero_and_it_grows(folder):
    _, adapters, step = build(folder, JudgementConfig(), rewards=lambda quality: [])
    noise, cond, prompts, _ = inputs()
    assert step(noise, cond, prompts, None, torch.Generator().manual_seed(0))[0].item() == 0
    moved(adapters)
    assert step(noise, cond, prompts, None, torch.Generator().manual_seed(0))[0].item() > 0


def test_hinge_by_hand():
    scores = torch.tensor([1.0, 3.0, 2.5], requires_grad=True)
    loss = feedback.hinge(scores, 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(1 / 3)
    assert scores.grad.tolist() == pytest.approx([-1 / 3, 0.0, 0.0])  # nothing above alpha


def test_a_good_enough_reward_leaves_no_gradient(folder):
    _, adapters, step = build(folder, JudgementConfig(anchor_weight=0), rewards=lambda quality: [RewardTerm(quality, -100.0, 1.0)])
    moved(adapters)
    noise, cond, prompts, _ = inputs()
    loss, _ = step(noise, cond, prompts, None, torch.Generator().manual_seed(0))
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or not p.grad.any() for p in adapters.parameters(STUDENT))


def test_the_walk_is_the_students_own_few_step_sampling():
    """From 999 to 249 on the trailing grid of four steps, as diffusers' DDIM goes."""
    schedule = Schedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(4)
    network = lambda x, t, cond: torch.tanh(x) + t.view(-1, 1, 1, 1) / 1000  # noqa: E731
    x = start = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = Conditioning(torch.zeros(2, 1, 1))
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(network(x, t.expand(2), cond), t, x).prev_sample
    walked = feedback.advance(network, start, [999, 749, 499, 249], cond, schedule, "epsilon")
    torch.testing.assert_close(walked, x, rtol=1e-4, atol=1e-5)
    clean = feedback.predict_clean(network, walked, 249, cond, schedule, "epsilon")
    at = torch.full((2,), 249)
    torch.testing.assert_close(ddim(clean, network(walked, at, cond), at, schedule), walked)
    assert torch.equal(feedback.advance(network, start, [999], cond, schedule, "epsilon"), start)


def lora(rank, targets, seed, folder):
    unet = load_teacher(TeacherConfig(source=str(folder)), parts=("unet",)).unet
    adapters = AdaptedUNet(unet, rank=rank, target_modules=targets, names=("x",), trainable=())
    for parameter in adapters.parameters("x"):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return adapters.export("x", {"sampling_contract": "{}"})


def test_combined_lora_is_the_sum_of_both_in_diffusers(folder, tmp_path):
    """Other ranks and other modules: one file, loaded by diffusers, gives the picture of both merged with their weights."""
    from safetensors.torch import save_file

    tscd, more = lora(4, ("to_q", "conv1"), 1, folder), lora(2, ("to_q", "to_v"), 2, folder)
    both = combine(tscd, more, 0.7)
    assert both.rank == 6 and isinstance(both, LoRA) and both.metadata == tscd.metadata
    save_file({k: v.contiguous() for k, v in both.tensors.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = tiny.load_pipeline(folder)
    pipeline.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    unet = load_teacher(TeacherConfig(source=str(folder)), parts=("unet",)).unet
    merge_lora(unet, tscd)
    merge_lora(unet, more, 0.7)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([400]), torch.randn(1, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(x, t, text).sample, unet(x, t, text).sample, rtol=1e-4, atol=1e-5)
