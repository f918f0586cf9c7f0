"""Running real code on tensors that have shapes but no memory, and counting the memory that they would take."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_SAME = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}
"""Operations whose number of multiplications PyTorch knows under another name."""
_READ = aten._local_scalar_dense.default


class Meter(TorchDispatchMode):
    """Adds up the bytes of all storages that are alive, and counts floating-point operations as PyTorch's ``FlopCounterMode`` does.

    What the library takes inside an operation, and gives back before it returns, is not seen.

    Attributes:
        now, peak: in bytes. operations: of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def reset(self) -> None:
        """Start the peak and the count of operations anew."""
        self.peak, self.operations = self.now, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _READ:  # a tensor without memory has no values: whatever is read is 1
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if count := flop_registry.get(_SAME.get(packet, packet)):
            self.operations += int(count(*args, **(kwargs or {}), out_val=out))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def dry_run() -> Iterator[Meter]:
    """All tensors that are made inside have no memory. Networks have to be built inside too."""
    from transformers.initialization import no_init_weights  # some initialisations draw again until they find values

    before = nn.Module._apply
    nn.Module._apply = _replace  # type: ignore[method-assign,assignment]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights(), Meter() as meter:
            yield meter
    finally:
        nn.Module._apply = before  # type: ignore[method-assign]


def _replace(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` for tensors without memory, which PyTorch's own cannot exchange in place."""
    for child in module.children() if recurse else ():
        _replace(child, fn)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                new = fn(parameter)
            if new is not parameter:
                module._parameters[name] = nn.Parameter(new, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fn(buffer)
    return module


def bytes_of(*values: Any) -> int:
    """The memory of all tensors in containers, each storage once."""
    found = {id(storage): storage.nbytes() for value in values for storage in _storages(value)}
    return sum(found.values())


def _storages(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield value.untyped_storage()
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _storages(item)
