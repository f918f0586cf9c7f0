"""The discriminator's features and head: what the whole pass computes, and a depth that follows the features."""

import pytest
import stages
import tiny
import torch
from stages import generator

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.backbones import UNetBackbone
from hypersd_pipeline.models.discriminator import make_head
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.recipes.distil import make_adapters
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.stage import build_stage


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def teacher(request, tmp_path_factory):
    return load_teacher(TeacherConfig(source=str(tiny.write_teacher(tmp_path_factory.mktemp(request.param), request.param))))


def test_features_are_those_of_the_whole_pass(teacher):
    backbone = teacher.backbone
    cond = teacher.encode_prompts(["a red apple", "two cats"])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        with backbone.watch_features() as seen:
            backbone(x, t, cond)
        alone = backbone.features(x, t, cond)
        assert len(seen) == 1 and torch.equal(alone, seen[0])
        backbone.features(x, t, cond)
    assert len(seen) == 1  # nobody watches any more
    assert make_head([backbone.feature_shape((4, 8, 8))], 32, 1, seed=0)(alone).shape == (2,)


@pytest.mark.parametrize("sides", [(8, 8), (16, 16), (24, 24), (7, 7), (5, 8), (9, 3), (2, 2), (1, 1), (1, 6)])
def test_the_shape_of_features_is_known_before(teacher, sides):
    cond = teacher.encode_prompts(["a red apple"])
    with torch.no_grad():
        found = teacher.backbone.features(torch.randn(1, 4, *sides), torch.tensor([3]), cond)
    assert tuple(found.shape[1:]) == teacher.backbone.feature_shape((4, *sides))


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("sides", [(8, 8), (13, 21)])
def test_each_level_but_the_last_halves_the_features(levels, sides):
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,) * (levels - 1) + (16,), norm_num_groups=4, layers_per_block=1, attention_head_dim=2,
        cross_attention_dim=32, down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels,
    )  # fmt: skip
    backbone = UNetBackbone(module)
    with torch.no_grad():
        found = backbone.features(torch.randn(1, 4, *sides), torch.tensor([3]), stages.rows(1).cond)
    assert tuple(found.shape[1:]) == backbone.feature_shape((4, *sides))
    assert found.shape[1] == 16 and found.shape[2] == -(-sides[0] // 2 ** (levels - 1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A UNet whose ``sample_size`` is 8. Its features have half of the latents' sides."""
    return TeacherConfig(source=str(tiny.write_sd15(tmp_path_factory.mktemp("sizes"))))


@pytest.mark.parametrize(
    ("sides", "blocks"),
    [
        ((8, 8), 1), ((16, 16), 2), ((24, 24), 3), ((64, 64), 4), ((16, 24), 2), ((24, 8), 1), ((7, 9), 1), ((2, 2), 1), ((1, 1), 1),
        ((2, 8), 1),
    ],
)  # fmt: skip
def test_the_heads_depth_follows_the_latents(checkpoint, sides, blocks):
    """Features of 4, 8, 12 and 32 positions a side go down to at most 2. One position stays one."""
    model = load_teacher(checkpoint, parts=("backbone",))
    assert model.backbone.module.config.sample_size == 8
    terms = {"consistency": {"segments": 2, "guidance": (3.0, 5.0)}, "adversarial": {"weight": 0.5, "hidden": 32}}
    config = StageConfig(terms=terms, lora=stages.LORA, loop=stages.LOOP)
    adapters = make_adapters(model, config)
    stages.moved(adapters, "student")
    context = stages.context(adapters, stages.rows(shape=(4, *sides)), segments=2)
    stage = build_stage(config, context, ready=lambda: adapters.use("student"))
    assert sum(isinstance(layer, torch.nn.GroupNorm) for layer in stage.adversary.head.layers) == blocks
    loss, scalars = stage(generator())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(scalars["discriminator_loss"])
    first, *_ = stage.adversary.head.parameters()
    assert first.grad.abs().sum() > 1e-3  # the head sees its features


@pytest.mark.parametrize("hidden", [32, 64, 128])
@pytest.mark.parametrize("sides", [(1, 1), (2, 2), (3, 3), (4, 4), (1, 5), (12, 12), (32, 8)])
def test_the_logit_depends_on_the_features(hidden, sides):
    """At one position a group of one value would normalise everything to zero."""
    head = make_head([(16, *sides)], hidden, 2, seed=0)
    features = torch.randn(1, 32, *sides, generator=generator(), requires_grad=True)
    head(features).sum().backward()
    assert features.grad.abs().sum() > 0.01
    assert not torch.allclose(head(features), head(features.flip(1)), atol=1e-4)


def test_a_head_comes_from_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    one, other, third = (make_head([(16, 4, 4)], 32, 1, seed=seed) for seed in (0, 0, 1))
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))  # noqa: E731
    assert same(one, other) and not same(one, third)


def test_features_of_several_levels(teacher):
    """The mid block's, and those of the blocks before it, with a head for each. The logit is the heads' mean."""
    backbone, cond = teacher.backbone, teacher.encode_prompts(["a red apple", "two cats"])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    outputs = []
    handles = [block.register_forward_hook(lambda m, i, o: outputs.append(o[0])) for block in backbone.module.down_blocks]
    with torch.no_grad():
        levels = backbone.feature_levels(x, t, cond, 3)
    for handle in handles:
        handle.remove()
    assert (
        torch.equal(levels[0], backbone.features(x, t, cond)) and torch.equal(levels[1], outputs[1]) and torch.equal(levels[2], outputs[0])
    )
    shapes = backbone.feature_shapes((4, 8, 8), 3)
    assert [tuple(level.shape[1:]) for level in levels] == shapes
    heads = make_head(shapes, 32, 1, seed=0)
    each = [head(level) for head, level in zip(heads.heads, levels, strict=True)]
    torch.testing.assert_close(heads(*levels), (each[0] + each[1] + each[2]) / 3)
    with pytest.raises(UserError, match="levels is 4, but the teacher's encoder has 3 levels"):
        backbone.feature_shapes((4, 8, 8), 4)


def test_without_normalisation_the_head_sees_the_scale_of_the_features():
    features = torch.randn(2, 16, 4, 4)
    for norm, sees in (("group", False), ("none", True)):
        head = make_head([(16, 4, 4)], 32, 1, seed=0, norm=norm)
        head.layers[0].bias.data.zero_()
        assert torch.allclose(head(features), head(3 * features), atol=1e-3) != sees
