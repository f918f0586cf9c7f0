"""LoRA layers computed as one layer, against peft's three products."""

import pytest
import torch
from tests import tiny

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

TARGETS = ("to_q", "to_v", "ff.net.0.proj", "conv1", "conv_shortcut", "downsamplers.0.conv", "proj_in", "time_emb_proj")


@pytest.fixture
def adapters(tmp_path):
    teacher = load_teacher(TeacherConfig(source=str(tiny.write_sd15(tmp_path))), parts=("backbone",))
    adapters = AdaptedBackbone(teacher.backbone, teacher.process, rank=2, target_modules=TARGETS)
    g = torch.Generator().manual_seed(1)
    for p in adapters.parameters("student"):
        p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
    return adapters


def _run(adapters, autocast=False):
    g = torch.Generator().manual_seed(0)
    config = adapters.backbone.module.config
    x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=g, requires_grad=True)
    cond = Conditioning(torch.randn(2, 7, config.cross_attention_dim, generator=g))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = adapters.denoiser("student").network(x, torch.tensor([999, 499]), cond)
    parameters = adapters.parameters("student")
    return output, torch.autograd.grad(output.float().square().mean(), [x, *parameters])


def _unfolded(monkeypatch):
    monkeypatch.setattr("hypersd_pipeline.models.adapters.can_fold", lambda layer, x: False)


def test_output_and_every_gradient_are_pefts(adapters, monkeypatch):
    output, gradients = _run(adapters)
    _unfolded(monkeypatch)
    expected, expected_gradients = _run(adapters)
    assert torch.allclose(output, expected, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert theirs.abs().max() > 0
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


def test_the_product_with_the_base_weight_is_made_once_a_layer(adapters, monkeypatch):
    def calls():
        seen = []
        original = torch.nn.functional.conv2d
        monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *a, **k: seen.append(1) or original(*a, **k))
        with torch.no_grad():
            _run_forward(adapters)
        monkeypatch.undo()
        return len(seen)

    convolutions = [m for m in adapters.backbone.module.modules() if isinstance(m, torch.nn.Conv2d)]
    low_rank = [m for name, m in adapters.backbone.module.named_modules() if isinstance(m, torch.nn.Conv2d) and ".lora_" in name]
    # conv1, conv_shortcut, downsampler and so on: one folded product each. Every plain convolution goes through nn.Conv2d
    assert calls() == len(convolutions) - len(low_rank)


def _run_forward(adapters):
    config = adapters.backbone.module.config
    x = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
    adapters.denoiser("student").network(x, torch.tensor([10]), Conditioning(torch.zeros(1, 7, config.cross_attention_dim)))


def test_under_autocast_and_in_bfloat16_the_factors_stay_apart(adapters, monkeypatch):
    with_folding, _ = _run(adapters, autocast=True)
    _unfolded(monkeypatch)
    without, _ = _run(adapters, autocast=True)
    assert torch.equal(with_folding, without)


def test_no_second_copy_of_the_weights_is_kept(adapters):
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _run(adapters)
    own = {p.untyped_storage().data_ptr() for p in adapters.backbone.module.parameters()}
    weights = [layer.base_layer.weight for layer in adapters._layers]
    copies = [t for t in kept for w in weights if t.shape == w.shape and t.untyped_storage().data_ptr() not in own]
    assert any(t is w for t in kept for w in weights)
    assert not copies
