"""LoRA layers computed as one layer with the weight ``W + B A``, and the factors' gradients without the gradient of ``W``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight


def can_fold(layer: Any, x: Tensor) -> bool:
    """Whether ``W + B A`` loses nothing: float32 weights outside autocast (bfloat16 would round it away), plain convolutions."""
    base = layer.base_layer
    if base.weight.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
        return False
    return isinstance(base, nn.Linear) or (isinstance(base, nn.Conv2d) and base.groups == 1 and base.padding_mode == "zeros")


def folded(layer: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What ``layer`` (a peft LoRA layer with scale 1) computes for ``x`` with the factors ``a`` and ``b``.

    One product instead of three each way, and no intermediate of the low-rank path is kept for the backward pass: the student costs what
    a UNet without LoRA layers costs, but for the factors' own gradients. The sum ``W + B A`` is made anew where it is needed, so that no
    second copy of the weights is held.

    Args:
        x: ``[..., in]`` of a linear layer, ``[n, in, h, w]`` of a convolution. a: ``[r, in]`` or ``[r, in, kh, kw]``.
        b: ``[out, r]`` or ``[out, r, 1, 1]``.
    """
    base = layer.base_layer
    if isinstance(base, nn.Linear):
        return _Linear.apply(x, base.weight, base.bias, a, b)  # type: ignore[no-any-return,no-untyped-call]
    return _Conv.apply(x, base.weight, base.bias, a, b, base.stride, base.padding, base.dilation)  # type: ignore[no-any-return,no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        return F.linear(x, torch.addmm(weight, b, a), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ torch.addmm(weight, b, a)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            grad_a, grad_b = (grads @ b).t() @ rows, grads.t() @ (rows @ a.t())
        return grad_x, None, None, grad_a, grad_b


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, stride: Any, padding: Any, dilation: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.where = (stride, padding, dilation)
        return F.conv2d(x, _sum(weight, a, b), bias, *ctx.where)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(x.shape, _sum(weight, a, b), grad, *ctx.where)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            low = F.conv2d(x, a, None, *ctx.where)
            grad_b = conv2d_weight(low, b.shape, grad)
            grad_a = conv2d_weight(x, a.shape, F.conv2d(grad, b.transpose(0, 1)), *ctx.where)
        return grad_x, None, None, grad_a, grad_b, None, None, None


def _sum(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(weight.flatten(1), b.flatten(1), a.flatten(1)).view_as(weight)
