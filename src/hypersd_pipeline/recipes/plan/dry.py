"""Running real code on tensors that have shapes but no memory, and counting the memory that they would take."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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
_DEVICE = torch.ops.prim.device.default


class Meter(TorchDispatchMode):
    """Gives operations results without memory, adds up the bytes of all that is alive, and counts floating-point operations.

    The first call of an operation with such shapes goes through PyTorch's ``FakeTensorMode``. What came out is remembered, because that
    takes far longer than to make the same result again (`_Outcome`). Operations are counted as ``FlopCounterMode`` does. What the library
    takes inside an operation, and gives back before it returns, is not seen.

    Attributes:
        now, peak: in bytes. operations: of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._alive: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it takes as long as all the rest

    def reset(self) -> None:
        """Start the peak and the count of operations anew."""
        self.peak, self.operations = self.now, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if func is _READ:  # a tensor without memory has no values: whatever is read is 1
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        tensors: list[Tensor] = []
        key = (func, _told(args, tensors), _told(tuple(kwargs.items()), tensors) if kwargs else None, torch.get_default_dtype())
        outcome = _KNOWN.get(key)
        if outcome is None:
            with self._fake:
                out = func(*args, **(kwargs or {}))
            self._count(func, args, kwargs, out)
            if key not in _KNOWN:
                _KNOWN[key] = _observed(func, args, kwargs, key, tensors, out)
            return out
        if not outcome:  # seen before, and not to be repeated without a look
            with self._fake:
                out = func(*args, **(kwargs or {}))
            self._count(func, args, kwargs, out)
            return out
        self.operations += outcome.operations
        made = [self._made(part, tensors) for part in outcome.parts]
        return outcome.form(made) if outcome.form else made[0]

    def _made(self, part: _Part, tensors: list[Tensor]) -> Any:
        """One result, as it was before."""
        if part.like is not None:
            source = tensors[part.like]
            if part.size is None:
                return source
            bare = torch.empty(0, dtype=part.dtype, device="meta")
            bare.set_(source.untyped_storage(), part.offset, part.size, part.stride)  # type: ignore[call-overload]
            return FakeTensor(self._fake, bare, part.device)
        if part.size is None:
            return part.value
        made = FakeTensor(self._fake, torch.empty_strided(part.size, part.stride, dtype=part.dtype, device="meta"), part.device)
        self._see(made)
        return made

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any) -> None:
        self.operations += _operations(func, args, kwargs, out)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)

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


class _Part(NamedTuple):
    """One result of an operation.

    Attributes:
        like: the input tensor, by its place among the inputs, that it is (no ``size``) or that it is a view of. None: it is new.
        value: what is not a tensor.
    """

    like: int | None = None
    size: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    value: Any = None


class _Outcome(NamedTuple):
    """What an operation gave for such inputs. form: makes a tuple or a list of several results. None: there is one."""

    parts: list[_Part]
    form: type | None
    operations: int


_KNOWN: dict[Any, _Outcome | tuple[()]] = {}
"""What operations gave. Nothing, where a result has a form that cannot be repeated."""


def _told(value: Any, tensors: list[Tensor]) -> Any:
    """What the form of a result can depend on, as a key. Adds the tensors in it to the list, in order."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, tuple | list):
        return tuple([_told(item, tensors) for item in value])
    return value.__class__, value


def _operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, out: Any) -> int:
    packet = func._overloadpacket
    count = flop_registry.get(_SAME.get(packet, packet))
    return int(count(*args, **(kwargs or {}), out_val=out)) if count else 0


def _observed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, key: Any, tensors: list[Tensor], out: Any) -> Any:
    """How to repeat what an operation gave. Nothing where an input was changed in its form, or a result has another one than is known."""
    again: list[Tensor] = []
    if (func, _told(args, again), _told(tuple(kwargs.items()), again) if kwargs else None) != key[:3]:
        return ()
    storages = {id(tensor.untyped_storage()): number for number, tensor in enumerate(tensors)}
    parts = [_part(value, tensors, storages) for value in (out if type(out) in (tuple, list) else (out,))]
    if any(part is None for part in parts):
        return ()
    return _Outcome(parts, type(out) if type(out) in (tuple, list) else None, _operations(func, args, kwargs, out))  # type: ignore[arg-type]


def _part(value: Any, tensors: list[Tensor], storages: Mapping[int, int]) -> _Part | None:
    if not isinstance(value, Tensor):
        return _Part(value=value) if value is None or type(value) in (int, float, bool) else None
    for number, tensor in enumerate(tensors):
        if value is tensor:
            return _Part(like=number)
    if type(value) is not FakeTensor:
        return None
    form = _Part(None, tuple(value.shape), value.stride(), int(value.storage_offset()), value.dtype, value.fake_device)
    like = storages.get(id(value.untyped_storage()))
    if like is not None:
        return form._replace(like=like) if isinstance(tensors[like], FakeTensor) else None
    whole = torch.empty_strided(form.size, form.stride, dtype=form.dtype, device="meta").untyped_storage().nbytes()  # type: ignore[arg-type]
    return form if not form.offset and whole == value.untyped_storage().nbytes() else None


@contextmanager
def dry_run() -> Iterator[Meter]:
    """All tensors that are made inside have no memory. Networks have to be built inside too."""
    from transformers.initialization import no_init_weights  # some initialisations draw again until they find values

    before = nn.Module._apply
    nn.Module._apply = _replace  # type: ignore[method-assign,assignment]
    try:
        with warnings.catch_warnings(), no_init_weights(), Meter() as meter:
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # copies ask whether there is one
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
