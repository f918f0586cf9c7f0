"""The UNet's class, and that nothing else knows the parts of a network."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hypersd_pipeline
from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.backbones import UNetBackbone, family_of
from hypersd_pipeline.models.backbones.unet import call_arguments, small_unet
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

PACKAGE = Path(hypersd_pipeline.__file__).parent
OF_A_NETWORK = re.compile(r"\b(down_blocks|up_blocks|mid_block|time_ids|added_cond_kwargs|UNet2DConditionModel|sample_size)\b")
EXCEPTIONS = {("recipes/teacher/vae.py", "sample_size")}  # the VAE's


def test_what_the_project_knows_of_a_network_stands_in_one_place():
    files = [f for f in PACKAGE.rglob("*.py") if (PACKAGE / "models/backbones") not in f.parents]
    assert len(files) > 100
    found = {(f.relative_to(PACKAGE).as_posix(), word) for f in files for word in OF_A_NETWORK.findall(f.read_text(encoding="utf-8"))}
    assert found == EXCEPTIONS
    assert set(OF_A_NETWORK.findall((PACKAGE / "models/backbones/unet.py").read_text())) >= {"mid_block", "time_ids"}


def test_conditioning_becomes_the_unets_arguments():
    plain, sdxl = Conditioning(torch.randn(2, 3, 4)), Conditioning(torch.randn(2, 3, 4), torch.randn(2, 5), torch.randn(2, 6))
    assert (
        list(call_arguments(plain)) == ["encoder_hidden_states"] and call_arguments(plain)["encoder_hidden_states"] is plain.prompt_embeds
    )
    added = call_arguments(sdxl)["added_cond_kwargs"]
    assert added["text_embeds"] is sdxl.pooled and added["time_ids"] is sdxl.sizes


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_features_are_those_of_the_whole_pass(tmp_path, layout):
    model = load_teacher(TeacherConfig(source=str(tiny.write_teacher(tmp_path, layout))), device="cpu")
    backbone, cond = model.backbone, model.encode_prompts(tiny.CAPTIONS[:2])
    x, t = torch.randn(2, *model.latent_shape), torch.tensor([999, 24])
    with backbone.watch_features() as seen:
        backbone(x, t, cond)
        backbone(x[:1], t[:1], cond[:1])
    backbone(x, t, cond)  # outside: not seen
    assert [len(one) for one in seen] == [2, 1]
    assert torch.equal(backbone.features(x, t, cond), seen[0])
    assert seen[0].shape[1:] == backbone.feature_shape(model.latent_shape)


@pytest.mark.parametrize(("side", "expected"), [(8, (48, 2, 2)), (9, (48, 3, 3)), (12, (48, 3, 3))])
def test_the_features_shape_is_the_networks(side, expected):
    torch.manual_seed(0)
    unet = small_unet(
        latent_channels=4, latent_size=side, text_width=8, block_out_channels=(16, 32, 48), layers_per_block=1, attention_head_dim=4,
        norm_num_groups=8,
    )  # fmt: skip
    backbone = UNetBackbone(unet)
    assert backbone.feature_shape((4, side, side)) == expected
    found = backbone.features(torch.randn(1, 4, side, side), torch.tensor([5]), Conditioning(torch.randn(1, 3, 8)))
    assert found.shape[1:] == expected


def test_the_weights_dtype_is_the_networks_and_not_the_loras(tmp_path):
    backbone = load_teacher(TeacherConfig(source=str(tiny.write_sd15(tmp_path)), dtype="bfloat16"), parts=("backbone",)).backbone
    assert backbone.dtype == torch.bfloat16
    x, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([5]), Conditioning(torch.randn(1, 3, 32))
    assert backbone.features(x, t, cond).dtype == torch.bfloat16
    assert backbone(x, t, cond).dtype == torch.float32  # the last convolution is exact


def test_latents_as_the_config_says(tmp_path):
    config = json.loads((tiny.write_sd15(tmp_path) / "unet" / "config.json").read_text())
    assert UNetBackbone.latent_shape(config) == (4, 8)


def test_a_folders_family_is_its_component(tmp_path):
    with pytest.raises(UserError, match="has none of the folders unet; give a complete diffusers folder"):
        family_of(tmp_path)
    (tmp_path / "unet").mkdir()
    assert family_of(tmp_path) is UNetBackbone


def test_targets_are_matched_as_peft_does(tmp_path):
    backbone = load_teacher(TeacherConfig(source=str(tiny.write_sd15(tmp_path))), parts=("backbone",)).backbone
    backbone.check_targets(["conv_in"])
    backbone.check_targets(["nothing", "to_q"])
    with pytest.raises(UserError, match="match no module of the network"):
        backbone.check_targets(["o_q"])  # the end of a name, but not a name


def test_the_last_convolution_is_exact_under_autocast():
    """Rounded to bf16, eps would have an error of 1e-3, which the way to x0 multiplies."""
    from hypersd_pipeline.models.backbones.base import ExactConv2d, ExactGroupNorm, exact

    conv, norm = torch.nn.Conv2d(8, 4, 3), torch.nn.GroupNorm(2, 8)
    x = torch.randn(2, 8, 5, 5).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = conv(x)
    names = set(conv.state_dict())
    exact(conv, norm)
    assert isinstance(conv, ExactConv2d) and isinstance(norm, ExactGroupNorm) and set(conv.state_dict()) == names
    expected = torch.nn.functional.conv2d(x.float(), conv.weight, conv.bias)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x), expected) and rounded.dtype == torch.bfloat16 and not torch.equal(rounded.float(), expected)
        assert norm(x).dtype == torch.float32


def test_adapters_are_compiled_once_each_and_switching_compiles_nothing(tmp_path):
    """A graph for each adapter and mode, without breaks. Then three more rounds through all of them compile nothing."""
    torch._dynamo.reset()
    model = load_teacher(TeacherConfig(source=str(tiny.write_sd15(tmp_path))), parts=("backbone",), device="cpu")
    adapters = AdaptedBackbone(model.backbone, model.process, rank=2, target_modules=("to_q", "conv1"))
    for parameter in (*adapters.parameters("student"), *adapters.parameters("ema")):
        torch.nn.init.normal_(parameter.data, std=0.1)
    batch = (torch.randn(2, *model.latent_shape), torch.tensor([999, 24]), Conditioning(torch.randn(2, 7, 32)))

    def round_trip():
        with torch.no_grad():
            found = [adapters.denoiser(name).network(*batch) for name in (None, "ema")]
        output = adapters.denoiser("student").network(*batch)
        return [*found, output.detach(), *torch.autograd.grad(output.square().sum(), adapters.parameters("student"))]

    expected = round_trip()
    counter = CompileCounterWithBackend("eager")
    model.backbone.compile(counter)
    for _ in range(4):
        assert all(torch.equal(a, b) for a, b in zip(round_trip(), expected, strict=True))
        assert counter.frame_count == 3 and not torch._dynamo.utils.counters["graph_break"]
    with adapters.watch_features() as seen:  # a discriminator's features still come with a pass
        adapters.denoiser(None).network(*batch)
    assert len(seen) == 1 and counter.frame_count == 3
    torch._dynamo.reset()


def test_held_in_bf16_the_size_conditioning_is_not_rounded(tmp_path):
    model = load_teacher(TeacherConfig(source=str(tiny.write_sdxl(tmp_path))), parts=("backbone",), device="cpu")
    model.backbone.hold_in(torch.bfloat16)
    unet, seen = model.backbone.module, []
    unet.add_time_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    sizes = torch.tensor([[1365.0, 715.0, 3.0, 5.0, 1024.0, 1024.0]])
    cond = Conditioning(torch.randn(1, 7, 80), torch.randn(1, 40), sizes)
    for call in (model.backbone, model.backbone.features):
        call(torch.randn(1, *model.latent_shape), torch.tensor([500]), cond)
        assert torch.equal(seen.pop(), sizes.flatten())
    exact = {name for name, p in unet.named_parameters() if p.dtype == torch.float32}
    assert {name.rpartition(".")[0] for name in exact} >= {"conv_out", "conv_norm_out"} and all(
        "norm" in name or name.startswith("conv_out") for name in exact
    )
