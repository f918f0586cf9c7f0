"""Ranks: the processes that train one stage together. The only place that knows them.

Every rank draws the same batches and takes its rows (`draws.Draws`), computes on them, and shares its gradients. So all of them make the
same updates on the same weights. The first rank writes and logs. Without a process group, everything here is as for one rank and moves
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hypersd_pipeline.draws import Draws
from hypersd_pipeline.errors import UserError

T = TypeVar("T")

BUCKET = 2**28
"""Numbers that are sent at a time, at most. The gradients of SDXL's LoRA of rank 64 are 2e8, of its whole UNet 2.6e9."""

_wire = torch.float32


def ranks() -> int:
    """How many processes train together. 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0 on."""
    return dist.get_rank() if ranks() > 1 else 0


def is_first() -> bool:
    """Whether this process writes and logs."""
    return rank() == 0


def send_gradients_as(dtype: torch.dtype) -> None:
    """From now on `average_gradients` sends numbers of this type: float32, or bfloat16 for half of the bytes."""
    global _wire
    _wire = dtype


def passes(generator: Draws, count: int) -> Iterator[int]:
    """The passes of an update. In each, the generator gives the rows of this rank."""
    for part in range(count):
        generator.take(part, count, rank(), ranks())
        yield part


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Put the mean of all ranks' gradients in place of each rank's own, sent as one flat buffer.

    A gradient that is missing counts as zero. All ranks give the same parameters in the same order.
    """
    if ranks() == 1:
        return
    for bucket in _buckets(parameters):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().to(_wire) for p in bucket])
        dist.all_reduce(flat.div_(ranks()))
        for parameter, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


def norm(x: Tensor) -> Tensor:
    """The norm of what all ranks have of ``x``, as if it lay in one place."""
    if ranks() == 1:
        return x.norm()
    square = x.float().square().sum()
    dist.all_reduce(square)
    return square.sqrt().to(x.dtype)


def means(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean over all ranks of each scalar. All ranks have the same names."""
    if ranks() == 1:
        return {name: float(value) for name, value in values.items()}
    stacked = torch.stack([value.detach().float() for value in values.values()])
    dist.all_reduce(stacked.div_(ranks()))
    return dict(zip(values, stacked.tolist(), strict=True))


def anywhere(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank."""
    if ranks() == 1:
        return flag
    raised = torch.tensor(float(flag), device=_device())
    dist.all_reduce(raised)
    return bool(raised > 0)


def agree(what: str, value: int) -> None:
    """Wait for all ranks. Raises UserError where ``value`` is not the same on all of them."""
    if ranks() == 1:
        return
    ends = torch.tensor([value, -value], dtype=torch.int64, device=_device())
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    high, low = int(ends[0]), -int(ends[1])
    if high != low:
        raise UserError(f"{what}: the processes found {low} to {high}; give all machines the same project folder.")


def wait() -> None:
    """Until all ranks are here."""
    if ranks() > 1:
        agree("wait", 0)


def of_first(call: Callable[[], T]) -> T:
    """What the call gives on the first rank, which alone makes it. Its UserError is raised on all of them."""
    if ranks() == 1:
        return call()
    box: list[Any] = [None]
    if is_first():
        try:
            box = [(call(), None)]
        except UserError as error:
            box = [(None, str(error))]
    dist.broadcast_object_list(box, src=0)
    value, refusal = box[0]
    if refusal is not None:
        raise UserError(refusal)
    return value  # type: ignore[no-any-return]


@contextmanager
def held_by_first(context: AbstractContextManager[None]) -> Iterator[None]:
    """The first rank is inside the context. A UserError on entering it is raised on all ranks."""
    with ExitStack() as stack:
        of_first(lambda: stack.enter_context(context))
        yield


def by_first(sink: Callable[..., None]) -> Callable[..., None]:
    """``sink`` on the first rank, and nothing on the others."""
    return sink if is_first() else lambda *args, **more: None


def share(what: str, count: int) -> int:
    """A rank's part of ``count`` samples. Raises UserError where the ranks cannot have equal parts."""
    if count % ranks():
        raise UserError(f"{what}: {count} samples of a pass cannot be shared by {ranks()} processes; use a multiple of {ranks()}.")
    return count // ranks()


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
