"""Adapters on one frozen network, and the LoRA they export."""

import copy

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tests import tiny

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

TARGETS = ("to_q", "to_v", "to_out.0", "conv1", "proj_in", "time_emb_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_sd15(tmp_path_factory.mktemp("teacher"))


def fresh(folder):
    return load_teacher(TeacherConfig(source=str(folder)), parts=("backbone",))


@pytest.fixture
def teacher(folder):
    return fresh(folder)


@pytest.fixture
def unet(teacher):
    return teacher.backbone.module


@pytest.fixture
def batch(unet):
    g = torch.Generator().manual_seed(0)
    c, s = unet.config.in_channels, unet.config.sample_size
    cond = Conditioning(torch.randn(2, 7, unet.config.cross_attention_dim, generator=g))
    return torch.randn(2, c, s, s, generator=g), torch.tensor([999, 499]), cond


def adapted(teacher, **options):
    return AdaptedBackbone(teacher.backbone, teacher.process, **{"rank": 2, "target_modules": TARGETS, **options})


def randomise(adapters, name, seed):
    g = torch.Generator().manual_seed(seed)
    for p in adapters.parameters(name):
        p.data.copy_(0.1 * torch.randn(p.shape, generator=g))


def test_each_adapter_computes_its_own_function(teacher, unet, batch):
    plain = unet(batch[0], batch[1], batch[2].prompt_embeds).sample
    reference = copy.deepcopy(unet)
    adapters = adapted(teacher)
    randomise(adapters, "student", 1)
    randomise(adapters, "ema", 2)
    for name in ("student", "ema"):
        merged = copy.deepcopy(reference)
        merge_lora(merged, adapters.export(name, {}))
        expected = merged(batch[0], batch[1], batch[2].prompt_embeds).sample
        assert torch.allclose(adapters.denoiser(name).network(*batch), expected, atol=1e-5)
        assert not torch.allclose(expected, plain, atol=1e-3)
    assert torch.equal(adapters.denoiser(None).network(*batch), plain)


def test_switching_agrees_with_pefts_own(teacher, unet, batch):
    adapters = adapted(teacher)
    randomise(adapters, "student", 1)
    ours = adapters.denoiser("student").network(*batch).detach()
    for layer in (m for m in unet.modules() if isinstance(m, BaseTunerLayer)):
        layer.enable_adapters(True)
        layer.set_adapter("student")
    assert torch.equal(unet(batch[0], batch[1], batch[2].prompt_embeds).sample.detach(), ours)


def test_only_the_student_is_trained(teacher, unet, batch):
    adapters = adapted(teacher)
    randomise(adapters, "student", 1)
    adapters.denoiser("ema").network(*batch)
    adapters.denoiser("student").network(*batch).sum().backward()
    trained = {id(p) for p in adapters.parameters("student")}
    with_gradient = {id(p) for p in unet.parameters() if p.grad is not None}
    assert with_gradient == trained
    assert {id(p) for p in unet.parameters() if p.requires_grad} == trained


def test_one_base_in_memory(teacher, unet):
    base = sum(p.numel() for p in unet.parameters())
    adapters = adapted(teacher, names=("student", "ema", "previous"))
    each = sum(p.numel() for p in adapters.parameters("student"))
    assert sum(p.numel() for p in unet.parameters()) == base + 3 * each


def test_gradient_checkpointing_keeps_the_students_gradient(folder, batch):
    gradients = []
    for checkpointing in (False, True):
        adapters = adapted(fresh(folder))
        randomise(adapters, "student", 1)
        randomise(adapters, "ema", 2)
        if checkpointing:
            adapters.backbone.checkpoint_gradients()
        adapters.denoiser("ema").network(*batch)
        adapters.denoiser("student").network(*batch).square().sum().backward()
        gradients.append([p.grad for p in adapters.parameters("student")])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-4, atol=1e-6)


def test_all_adapters_start_alike_and_from_the_previous_stage(folder):
    first = adapted(fresh(folder))
    randomise(first, "ema", 3)
    lora = first.export("ema", {})
    second = adapted(fresh(folder), names=("student", "ema", "previous"), start=lora)
    for name in ("student", "ema", "previous"):
        for key, tensor in second.export(name, {}).tensors.items():
            assert torch.equal(tensor, lora.tensors[key])
    with pytest.raises(UserError, match=r"lora\.rank: 1 is lower than the rank \d of the LoRA that the stage starts from"):
        adapted(fresh(folder), rank=1, start=lora)
    with pytest.raises(UserError, match=r"lora\.target_modules: the LoRA that the stage starts from also changes"):
        adapted(fresh(folder), target_modules=("to_q",), start=lora)
    with pytest.raises(UserError, match="match no module"):
        adapted(fresh(folder), target_modules=("nothing_like_it",))


def test_merge_refuses_a_foreign_lora(unet):
    with pytest.raises(UserError, match="does not fit this network"):
        merge_lora(unet, LoRA({"unet.other.lora_A.weight": torch.zeros(1, 4), "unet.other.lora_B.weight": torch.zeros(4, 1)}))
    with pytest.raises(UserError, match="only one of lora_A and lora_B"):
        LoRA({"unet.conv_in.lora_A.weight": torch.zeros(1, 4)}).modules()
    with pytest.raises(UserError, match="not in diffusers' PEFT format"):
        LoRA({"lora_unet_conv_in.lora_up.weight": torch.zeros(1, 4)}).modules()
