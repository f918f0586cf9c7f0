"""LoRA layers computed in the cheaper of two ways: as one layer with the weight ``W + B A``, or with the factors apart.

With the factors apart a pass multiplies every position with both factors. With the sum it multiplies the factors with each other, once a
pass, whatever the number of positions is. So the sum pays where many positions go through a small weight. Which way is taken is counted
for each layer and each direction (`Ways`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

ALWAYS = 7_500_000
"""A sum of so many multiplications or fewer is made whatever the count says: it takes less time than the calls that it saves."""


_plain = False  # a global, and no context variable: torch.compile cannot see through one


@contextmanager
def in_plain_operations() -> Iterator[None]:
    """Inside, LoRA layers compute with operations of PyTorch alone, which know derivatives along a direction (``torch.func.jvp``)."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


class Ways(NamedTuple):
    """Whether the sum ``W + B A`` is used: on the way forward, and for the gradient of the input."""

    forward: bool
    backward: bool


def is_plain(base: nn.Module) -> bool:
    """Whether a layer is one that this module computes: linear, or a convolution without groups and with zeros around the image."""
    if type(base) is nn.Conv2d:
        return base.groups == 1 and base.padding_mode == "zeros"
    return type(base) is nn.Linear


def choose_ways(positions: int, wide: int, out: int, rank: int, *, learns: bool) -> Ways:
    """The cheaper way in each direction, in multiplications.

    Making the sum takes ``rank wide out``. Apart, the way forward takes ``positions rank (wide + out)`` more, and the gradient of the input
    ``positions rank wide`` more. Where the factors learn, their gradients need ``A x``: with the sum, ``positions rank wide`` more.

    Args:
        learns: whether the factors get gradients.
        positions: of the output, of all samples. wide: inputs of one output: channels, for a convolution times those of its kernel.
        out: channels of the output.
    """
    if rank * wide * out <= ALWAYS:
        return Ways(True, True)
    saved = positions * (out if learns else wide + out)
    return Ways(saved >= wide * out, positions >= out)


def adapted(base: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What a LoRA layer with scale 1 on ``base`` computes for ``x`` with the factors ``a`` and ``b``.

    It computes in autocast's dtype, or else in that of the frozen weight. In float32 it takes the cheaper way (`choose_ways`). In any
    other dtype the sum would round small factors away, so that the factors stay apart. No copy of the frozen weight is kept: the sum is
    made anew where it is needed, and a weight that has the dtype of the computation is used as it is.

    Args:
        base: see `is_plain`. x: ``[..., in]`` of a linear layer, ``[n, in, h, w]`` of a convolution.
        a: ``[r, in]`` or ``[r, in, kh, kw]``. b: ``[out, r]`` or ``[out, r, 1, 1]``. Both float32.
    """
    device = x.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else base.weight.dtype
    bias = None if base.bias is None else base.bias.to(dtype)
    x, weight, a, b = x.to(dtype), base.weight.to(dtype), a.to(dtype), b.to(dtype)
    with torch.autocast(device, enabled=False) if cast else nullcontext():
        if _plain:
            return _plainly(base, x, weight, bias, a, b)
        if isinstance(base, nn.Linear):
            ways = _ways(dtype, x.numel() // x.shape[-1], a, b)
            return _Linear.apply(x, weight, bias, a, b, ways)  # type: ignore[no-any-return,no-untyped-call]
        ways = _ways(dtype, _positions(x, base), a, b)
        return _Conv.apply(x, weight, bias, a, b, ways, base.stride, base.padding, base.dilation)  # type: ignore[no-any-return,no-untyped-call]


def _plainly(base: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """With the factors apart, as in any dtype."""
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b)
    where = (base.stride, base.padding, base.dilation)
    return F.conv2d(x, weight, bias, *where) + F.conv2d(F.conv2d(x, a, None, *where), b)


def _ways(dtype: torch.dtype, positions: int, a: Tensor, b: Tensor) -> Ways:
    learns = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    return choose_ways(positions, a[0].numel(), len(b), len(a), learns=learns) if dtype == torch.float32 else Ways(False, False)


def _positions(x: Tensor, base: nn.Conv2d) -> int:
    n, _, height, width = x.shape
    return n * (height // base.stride[0]) * (width // base.stride[1])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, ways: Ways) -> Tensor:
        low = None
        if ways.forward:
            output = F.linear(x, torch.addmm(weight, b, a), bias)
        else:
            low = F.linear(x, a)
            output = F.linear(x, weight, bias)
            output.view(-1, len(b)).addmm_(low.view(-1, len(a)), b.t())
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.folded = ways.backward
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        factors = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        grads = grad.reshape(-1, grad.shape[-1])
        low_grad = grads @ b if factors or not ctx.folded else None
        if ctx.needs_input_grad[0]:
            if ctx.folded:
                grad_x = grad @ torch.addmm(weight, b, a)
            else:
                grad_x = (grads @ weight).addmm_(low_grad, a).view(x.shape)
        if factors:
            assert low_grad is not None
            rows = x.reshape(-1, x.shape[-1])
            grad_a, grad_b = low_grad.t() @ rows, grads.t() @ (rows @ a.t() if low is None else low.view(-1, len(a)))
        return grad_x, None, None, grad_a, grad_b, None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, ways: Ways, stride: Any, padding: Any, dilation: Any
    ) -> Tensor:
        ctx.where = (stride, padding, dilation)
        low = None
        if ways.forward:
            output = F.conv2d(x, _sum(weight, a, b), bias, *ctx.where)
        else:
            low = F.conv2d(x, a, None, *ctx.where)
            output = _add_product(F.conv2d(x, weight, bias, *ctx.where), low, b)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.folded = ways.backward
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        factors = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        low_grad = F.conv2d(grad, b.transpose(0, 1)) if factors or not ctx.folded else None
        if ctx.needs_input_grad[0]:
            if ctx.folded:
                grad_x = conv2d_input(x.shape, _sum(weight, a, b), grad, *ctx.where)
            else:
                grad_x = conv2d_input(x.shape, weight, grad, *ctx.where)
                grad_x += conv2d_input(x.shape, a, low_grad, *ctx.where)
        if factors:
            low = F.conv2d(x, a, None, *ctx.where) if low is None else low
            grad_b = conv2d_weight(low, b.shape, grad)
            grad_a = conv2d_weight(x, a.shape, low_grad, *ctx.where)
        return grad_x, None, None, grad_a, grad_b, None, None, None, None


def _sum(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(weight.flatten(1), b.flatten(1), a.flatten(1)).view_as(weight)


def _add_product(output: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """``output + B low``, in place: ``[n, out, h, w]`` and ``[n, r, h, w]``. No image of the product's size is made besides."""
    wide = b.flatten(1)
    if output.is_contiguous() and low.is_contiguous():
        output.flatten(2).baddbmm_(wide.expand(len(output), -1, -1), low.flatten(2))
        return output
    if all(t.is_contiguous(memory_format=torch.channels_last) for t in (output, low)):
        output.permute(0, 2, 3, 1).view(-1, len(b)).addmm_(low.permute(0, 2, 3, 1).reshape(-1, len(wide.t())), wide.t())
        return output
    return output.add_(F.conv2d(low, b))
