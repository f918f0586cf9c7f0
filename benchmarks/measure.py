"""Time in interleaved rounds, peak memory of one process, and passes counted by hooks."""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm.auto import tqdm

from hypersd_pipeline.models.backbones import Backbone

Task = Callable[[], dict[str, float]]
"""Does something once and says how many seconds each of its named parts took."""


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call, the device's queue included."""
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


def each_alone(script: str, argv: Sequence[str], rows: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What ``script --alone NAME`` prints as JSON on its last line, for each of the rows: name -> title. Each has a process of its own.

    Ends this process where one of them fails.
    """
    for name, title in rows.items():
        print(title, file=sys.stderr)
        done = subprocess.run([sys.executable, script, *argv, "--alone", name], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"Error: {title} ended with exit code {done.returncode}; with too little memory use a smaller --batch.")
        yield name, json.loads(done.stdout.splitlines()[-1])


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """As a stage computes: in bf16, or plainly where the dtype is another one."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def interleaved(tasks: Mapping[str, Task], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Run every task once a round, in turn, so that a busy host slows all of them alike.

    Returns:
        for each named part the seconds of every round after the ``warmup`` ones.
    """
    found: dict[str, list[float]] = {}
    for number in tqdm(range(warmup + rounds), desc="rounds", file=sys.stderr):
        for task in tasks.values():
            for name, value in task().items():
                if number >= warmup:
                    found.setdefault(name, []).append(value)
    return found


class PeakMemory:
    """Peak memory of this process since the object was made: CUDA's allocations, or resident memory above what there was then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = psutil.Process().memory_info().rss
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(device)

    def mb(self) -> float:
        """In MB (2^20 bytes)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return (_peak_resident() - self.before) / 2**20


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss may be the parent's: it survives the start of a new program
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


class PassCounter:
    """Counts, in batches, the passes through whole UNets, and through an encoder and mid block alone (the discriminator's).

    Args:
        backbones: every UNet that is used. batch: samples of one pass.
    """

    def __init__(self, backbones: list[Backbone], batch: int) -> None:
        self.batch = batch
        self.samples = dict.fromkeys(("unet_forward", "unet_backward", "mid_forward", "mid_backward"), 0)
        for backbone in backbones:
            backbone.module.register_forward_hook(self._hook("unet"))
            backbone.feature_module().register_forward_hook(self._hook("mid"))

    def _hook(self, part: str) -> Callable[..., None]:
        def add(direction: str, n: int) -> None:
            self.samples[f"{part}_{direction}"] += n

        def hook(module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            add("forward", len(tensor))
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: add("backward", len(grad)))

        return hook

    def passes(self) -> dict[str, float]:
        """``unet_forwards``, ``unet_backwards``, ``encoder_forwards``, ``encoder_backwards``, in batches."""
        counts = {}
        for direction in ("forward", "backward"):
            whole, mid = self.samples[f"unet_{direction}"], self.samples[f"mid_{direction}"]
            counts[f"unet_{direction}s"] = whole / self.batch
            counts[f"encoder_{direction}s"] = (mid - whole) / self.batch
        return counts


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions in a call, by PyTorch's formulas."""
    with _Operations() as counter:
        call()
    return counter.total


class _Operations(TorchDispatchMode):
    """PyTorch's own ``FlopCounterMode`` stops at ``autograd.grad``, because it follows modules too."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        cpu = torch.ops.aten  # its attention is not in PyTorch's table, only the GPU's is
        self.formulas = {
            **flop_registry,
            cpu._scaled_dot_product_flash_attention_for_cpu: flop_registry[cpu._scaled_dot_product_flash_attention],
            cpu._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[cpu._scaled_dot_product_flash_attention_backward],
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if formula := self.formulas.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


def resident_unets(unet: Any, others: list[nn.Module]) -> float:
    """All parameters in memory, without LoRAs and ``others`` (VAE, text encoders), over those of one base UNet."""
    base = {p.data_ptr(): p.numel() for name, p in unet.named_parameters() if ".lora_" not in name}
    left_out = {p.data_ptr() for module in others for p in module.parameters()}
    lora = {p.data_ptr() for name, p in unet.named_parameters() if ".lora_" in name}
    alive = {o.data_ptr(): o.numel() for o in gc.get_objects() if type(o) is nn.Parameter}
    return sum(n for pointer, n in alive.items() if pointer not in left_out | lora) / sum(base.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
