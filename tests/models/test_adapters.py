"""Adapters on one frozen UNet, and the LoRA they export."""

import copy

import pytest
import torch
from tests import tiny

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.adapters import AdaptedUNet
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

TARGETS = ("to_q", "to_v", "to_out.0", "conv1", "proj_in", "time_emb_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_sd15(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def unet(folder):
    return load_teacher(TeacherConfig(source=str(folder)), parts=("unet",)).unet


@pytest.fixture
def batch(unet):
    g = torch.Generator().manual_seed(0)
    c, s = unet.config.in_channels, unet.config.sample_size
    cond = Conditioning(torch.randn(2, 7, unet.config.cross_attention_dim, generator=g))
    return torch.randn(2, c, s, s, generator=g), torch.tensor([999, 499]), cond


def randomise(adapters, name, seed):
    g = torch.Generator().manual_seed(seed)
    for p in adapters.parameters(name):
        p.data.copy_(0.1 * torch.randn(p.shape, generator=g))


def test_each_adapter_computes_its_own_function(unet, batch):
    plain = unet(batch[0], batch[1], batch[2].prompt_embeds).sample
    reference = copy.deepcopy(unet)
    adapters = AdaptedUNet(unet, rank=2, target_modules=TARGETS)
    randomise(adapters, "student", 1)
    randomise(adapters, "ema", 2)
    for name in ("student", "ema"):
        merged = copy.deepcopy(reference)
        merge_lora(merged, adapters.export(name, {}))
        expected = merged(batch[0], batch[1], batch[2].prompt_embeds).sample
        assert torch.allclose(adapters.denoiser(name)(*batch), expected, atol=1e-5)
        assert not torch.allclose(expected, plain, atol=1e-3)
    assert torch.equal(adapters.denoiser(None)(*batch), plain)


def test_switching_agrees_with_pefts_own(unet, batch):
    adapters = AdaptedUNet(unet, rank=2, target_modules=TARGETS)
    randomise(adapters, "student", 1)
    ours = adapters.denoiser("student")(*batch).detach()
    unet.enable_adapters()
    unet.set_adapter("student")
    assert torch.equal(unet(batch[0], batch[1], batch[2].prompt_embeds).sample.detach(), ours)


def test_only_the_student_is_trained(unet, batch):
    adapters = AdaptedUNet(unet, rank=2, target_modules=TARGETS)
    randomise(adapters, "student", 1)
    adapters.denoiser("ema")(*batch)
    adapters.denoiser("student")(*batch).sum().backward()
    trained = {id(p) for p in adapters.parameters("student")}
    with_gradient = {id(p) for p in unet.parameters() if p.grad is not None}
    assert with_gradient == trained
    assert {id(p) for p in unet.parameters() if p.requires_grad} == trained


def test_one_base_in_memory(unet):
    base = sum(p.numel() for p in unet.parameters())
    adapters = AdaptedUNet(unet, rank=2, target_modules=TARGETS, names=("student", "ema", "previous"))
    each = sum(p.numel() for p in adapters.parameters("student"))
    assert sum(p.numel() for p in unet.parameters()) == base + 3 * each


def test_gradient_checkpointing_keeps_the_students_gradient(folder, batch):
    gradients = []
    for checkpointing in (False, True):
        unet = load_teacher(TeacherConfig(source=str(folder)), parts=("unet",)).unet
        adapters = AdaptedUNet(unet, rank=2, target_modules=TARGETS)
        randomise(adapters, "student", 1)
        randomise(adapters, "ema", 2)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        adapters.denoiser("ema")(*batch)
        adapters.denoiser("student")(*batch).square().sum().backward()
        gradients.append([p.grad for p in adapters.parameters("student")])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-4, atol=1e-6)


def test_all_adapters_start_alike_and_from_the_previous_stage(folder):
    def fresh():
        return load_teacher(TeacherConfig(source=str(folder)), parts=("unet",)).unet

    first = AdaptedUNet(fresh(), rank=2, target_modules=TARGETS)
    randomise(first, "ema", 3)
    lora = first.export("ema", {})
    second = AdaptedUNet(fresh(), rank=2, target_modules=TARGETS, names=("student", "ema", "previous"), start=lora)
    for name in ("student", "ema", "previous"):
        for key, tensor in second.export(name, {}).tensors.items():
            assert torch.equal(tensor, lora.tensors[key])
    with pytest.raises(UserError, match="rank: 4 differs"):
        AdaptedUNet(fresh(), rank=4, target_modules=TARGETS, start=lora)
    with pytest.raises(UserError, match="has other modules"):
        AdaptedUNet(fresh(), rank=2, target_modules=("to_q",), start=lora)
    with pytest.raises(UserError, match="match no module"):
        AdaptedUNet(fresh(), rank=2, target_modules=("nothing_like_it",))


def test_merge_refuses_a_foreign_lora(unet):
    with pytest.raises(UserError, match="does not fit this UNet"):
        merge_lora(unet, LoRA({"unet.other.lora_A.weight": torch.zeros(1, 4), "unet.other.lora_B.weight": torch.zeros(4, 1)}))
    with pytest.raises(UserError, match="only one of lora_A and lora_B"):
        LoRA({"unet.conv_in.lora_A.weight": torch.zeros(1, 4)}).modules()
    with pytest.raises(UserError, match="not of a UNet in diffusers' PEFT format"):
        LoRA({"lora_unet_conv_in.lora_up.weight": torch.zeros(1, 4)}).modules()
