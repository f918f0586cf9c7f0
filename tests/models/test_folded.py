"""LoRA layers computed as one layer or with the factors apart, against peft's three products."""

import pytest
import torch
from tests import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.models import folded
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.folded import Ways, choose_ways
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher

TARGETS = ("to_q", "to_v", "ff.net.0.proj", "conv1", "conv_shortcut", "downsamplers.0.conv", "proj_in", "time_emb_proj")
WAYS = [Ways(forward, backward) for forward in (True, False) for backward in (True, False)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return str(tiny.write_sd15(tmp_path_factory.mktemp("teacher")))


def adapted(source, held_in=None):
    teacher = load_teacher(TeacherConfig(source=source), parts=("backbone",), device="cpu")
    if held_in is not None:
        teacher.backbone.hold_in(held_in)
    adapters = AdaptedBackbone(teacher.backbone, teacher.process, rank=2, target_modules=TARGETS)
    g = torch.Generator().manual_seed(1)
    for p in adapters.parameters("student"):
        p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
    return adapters


@pytest.fixture
def adapters(source):
    return adapted(source)


def _run(adapters, autocast=False, memory_format=torch.contiguous_format):
    g = torch.Generator().manual_seed(0)
    config = adapters.backbone.module.config
    x = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=g)
    x = x.to(memory_format=memory_format).requires_grad_()
    cond = Conditioning(torch.randn(2, 7, config.cross_attention_dim, generator=g))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = adapters.denoiser("student").network(x, torch.tensor([999, 499]), cond)
    parameters = adapters.parameters("student")
    return output, torch.autograd.grad(output.float().square().mean(), [x, *parameters])


def _pefts(monkeypatch):
    monkeypatch.setattr("hypersd_pipeline.models.adapters.is_plain", lambda base: False)


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_and_every_gradient_are_pefts(adapters, monkeypatch, ways, memory_format):
    if memory_format == torch.channels_last:
        adapters.backbone.module.to(memory_format=memory_format)
    monkeypatch.setattr(folded, "choose_ways", lambda *sizes, learns: ways)
    output, gradients = _run(adapters, memory_format=memory_format)
    _pefts(monkeypatch)
    expected, expected_gradients = _run(adapters)
    assert torch.allclose(output, expected, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert theirs.abs().max() > 0
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


def test_the_way_is_the_one_with_fewer_multiplications():
    """By hand: rank r, weights of 512 x 512 x 3 x 3, whose sum takes r * 4608 * 512. Apart, a position takes r * (4608 + 512) more."""
    wide, out, rank = 512 * 9, 512, 64
    assert choose_ways(461, wide, out, rank, learns=False) == Ways(True, False)  # 461 * 5120 > 4608 * 512
    assert choose_ways(460, wide, out, rank, learns=False) == Ways(False, False)
    assert choose_ways(512, wide, out, rank, learns=False) == Ways(True, True)  # back, a position takes r * 4608 more
    assert choose_ways(4607, wide, out, rank, learns=True) == Ways(False, True)  # the factors' gradients want A x: r * 4608 a position
    assert choose_ways(4608, wide, out, rank, learns=True) == Ways(True, True)
    assert choose_ways(2, 640, 640, 64, learns=True) == Ways(False, False)


def test_every_layer_of_the_packaged_teacher_is_folded_at_the_default_ranks():
    """A small sum is always made. The unified LoRA has rank 24."""
    network = load_teacher(TeacherConfig(), parts=("backbone",), device="cpu").backbone.module
    sizes = [(m.weight[0].numel(), len(m.weight)) for m in network.modules() if folded.is_plain(m)]
    assert len(sizes) > 100
    assert all(choose_ways(1, wide, out, 24, learns=True) == Ways(True, True) for wide, out in sizes)


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


def test_under_autocast_the_factors_stay_apart(adapters, monkeypatch):
    monkeypatch.setattr(folded, "_sum", None)
    monkeypatch.setattr(torch, "addmm", None)
    output, gradients = _run(adapters, autocast=True)
    monkeypatch.undo()
    exact, exact_gradients = _run(adapters)
    assert (output - exact).norm() < 0.02 * exact.norm()
    for ours, theirs in zip(gradients, exact_gradients, strict=True):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.1 * theirs.norm()


class FrozenCasts(TorchDispatchMode):
    """Counts the casts of frozen weights."""

    def __init__(self, adapters):
        super().__init__()
        parameters = adapters.backbone.module.named_parameters()
        self.frozen = {p.untyped_storage().data_ptr() for name, p in parameters if ".lora_" not in name}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket is torch.ops.aten._to_copy:
            self.count += args[0].untyped_storage().data_ptr() in self.frozen
        return func(*args, **(kwargs or {}))


def test_no_frozen_weight_is_cast_in_a_pass(source):
    """Held in bf16, every pass computes what autocast computed with float32 weights, without a cast of them."""
    found = {}
    for held_in in (None, torch.bfloat16):
        adapters = adapted(source, held_in)
        with FrozenCasts(adapters) as casts:
            output, gradients = _run(adapters, autocast=True)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                _run_forward(adapters)
        found[held_in] = (casts.count, output, gradients)
        assert all(p.dtype == torch.float32 for p in adapters.parameters("student"))
    (before, expected, expected_gradients), (after, output, gradients) = found[None], found[torch.bfloat16]
    assert before > 100 and after == 0
    assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


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
