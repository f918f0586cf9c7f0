"""Ranks: the processes that train one stage together. The only place that knows them.

Every rank draws the same batches and takes its rows (`draws.Draws`), computes on them, and shares its gradients. So all of them make the
same updates on the same weights. The first rank writes and logs. Without a process group, everything here is as for one rank and moves
nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from hypersd_pipeline.config import Count, Strict
from hypersd_pipeline.draws import Draws
from hypersd_pipeline.errors import UserError

T = TypeVar("T")

BUCKET = 2**28
"""Numbers that are sent at a time, at most. The gradients of SDXL's LoRA of rank 64 are 2e8, of its whole UNet 2.6e9."""

PATIENCE = timedelta(hours=1)
"""How long a rank waits for the others: the first one may be writing a large checkpoint, or measuring for the guard."""

_wire = torch.float32


class ComputeConfig(Strict):
    """How many processes train a stage, and where.

    Attributes:
        processes: on each machine. ``auto``: one for each GPU, and one on a machine without.
        nodes: machines. rendezvous: ``host:port`` of one of them, where they find each other. Needed for more than one. ``job``: the first
            machine of the cluster's job that this process belongs to.
        max_restarts: how often the processes are started again from the last checkpoint after one of them has died.
        gradients: the type in which gradients are sent. ``bf16`` halves the bytes and rounds.
    """

    processes: Literal["auto"] | Count
    nodes: Count = 1
    rendezvous: Literal["job"] | Annotated[str, Field(pattern=r"^[^:\s]+:\d+$")] | None = None
    max_restarts: int = Field(default=3, ge=0, le=1000)
    gradients: Literal["float32", "bf16"] = "float32"

    @model_validator(mode="after")
    def _findable(self) -> ComputeConfig:
        if self.nodes > 1 and self.rendezvous is None:
            raise ValueError(
                f"nodes is {self.nodes}, and they need a place to find each other: set rendezvous to host:port of one of them, or to job"
            )
        return self

    @property
    def endpoint(self) -> str | None:
        """``host:port`` where the machines find each other.

        Raises:
            UserError: it is that of a job, and this is none.
        """
        if self.rendezvous != "job":
            return self.rendezvous
        found = os.environ.get("HYPERSD_RENDEZVOUS")
        if found is None:
            raise UserError("compute.rendezvous is job, but this is no job of a cluster, so set it to host:port or compute.nodes to 1.")
        return found

    @property
    def here(self) -> int:
        """Processes on this machine.

        Raises:
            UserError: it has fewer GPUs.
        """
        gpus = torch.cuda.device_count()
        if self.processes == "auto":
            return max(1, gpus)
        if gpus and self.processes > gpus:
            raise UserError(f"compute.processes is {self.processes}, but this machine has {gpus} GPUs; use auto.")
        return self.processes


def start(module: str, folder: Path, compute: ComputeConfig) -> bool | None:
    """Run ``python -m module folder`` in every process of this machine with torchrun's agent, and wait for them.

    A group in which a process dies is started again, ``max_restarts`` times at most. SIGTERM and SIGINT are passed on.

    Returns:
        Whether all processes ended well. None where a signal ended them.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")  # for the last update and its checkpoint; then SIGKILL
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or processes that are started again find the addresses of those that died
    (folder / "logs").mkdir(exist_ok=True)
    config = LaunchConfig(
        min_nodes=compute.nodes,
        max_nodes=compute.nodes,
        nproc_per_node=compute.here,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint=compute.endpoint or "localhost:0",
        local_addr=None if compute.endpoint else "localhost",
        max_restarts=compute.max_restarts,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )
    with _handlers_restored():
        try:
            elastic_launch(config, sys.executable)("-m", module, str(folder))
        except SignalException:
            return None
        except ChildFailedError:
            return False
    return True


@contextmanager
def _handlers_restored() -> Iterator[None]:
    """The agent sets handlers of signals and leaves them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def joined(compute: ComputeConfig) -> Iterator[None]:
    """The process group of a process that torchrun has started."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    send_gradients_as(torch.bfloat16 if compute.gradients == "bf16" else torch.float32)
    try:
        yield
    finally:
        dist.destroy_process_group()


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


def mean(x: Tensor) -> Tensor:
    """The mean over all ranks of a tensor, elementwise. It stays on its device."""
    if ranks() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / ranks()


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


def mine(items: Sequence[T]) -> Sequence[T]:
    """The items of a sequence that this rank works on: every n-th of them. All of them without a process group."""
    return items[rank() :: ranks()]


def gathered(made: list[T]) -> list[T]:
    """What all ranks have made, each of one of its items (`mine`), in the order of the items. Every rank gets all of it.

    Tensors in it are on the CPU.
    """
    if ranks() == 1:
        return made
    parts: list[list[T]] = [[] for _ in range(ranks())]
    dist.all_gather_object(parts, made)
    return [parts[i % ranks()][i // ranks()] for i in range(sum(map(len, parts)))]


def by_first(sink: Callable[..., None]) -> Callable[..., None]:
    """``sink`` on the first rank, and nothing on the others."""
    return sink if is_first() else lambda *args, **more: None


def share(what: str, count: int, among: int | None = None) -> int:
    """A rank's part of ``count`` samples.

    Args:
        among: how many ranks there are to be. None: as there are.

    Raises:
        UserError: the ranks cannot have equal parts.
    """
    among = among or ranks()
    if count % among:
        raise UserError(f"{what}: {count} samples of a pass cannot be shared by {among} processes; use a multiple of {among}.")
    return count // among


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
