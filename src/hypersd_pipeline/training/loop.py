"""The training loop: one place for every stage."""

from __future__ import annotations

import logging
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pydantic import Field, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from hypersd_pipeline.config import Strict
from hypersd_pipeline.training.checkpoints import CheckpointStore

log = logging.getLogger(__name__)

MetricStream = Callable[[dict[str, float], int], None]
"""``log(metrics, step)``: where live figures go."""


class Stateful(Protocol):
    """Anything with PyTorch's state-dict pair."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class LoopConfig(Strict):
    """How a stage is optimised.

    Attributes:
        steps: optimiser updates. batch_size: samples an update (before accumulation it is divided by ``accumulate``).
        learning_rate, schedule, warmup_steps: see `learning_rate_at`.
        max_grad_norm: clipping. betas, weight_decay: AdamW's.
        mixed_precision: ``no`` or ``bf16`` (autocast; LoRA gradients in fp16 would need loss scaling, so it is not offered).
        log_every, checkpoint_every: in updates.
        seed: of every random draw of the stage.
        max_bad_steps: consecutive non-finite losses before the stage gives up.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    mixed_precision: Literal["no", "bf16"] = "no"
    log_every: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=100, ge=1)
    seed: int = 0
    max_bad_steps: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _whole_passes(self) -> LoopConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        return self

    def identity(self) -> dict[str, Any]:
        """What the trained weights depend on: a checkpoint stays good when only the logging changes."""
        return self.model_dump(mode="json", exclude={"log_every", "checkpoint_every", "max_bad_steps"})


class TrainingStopped(RuntimeError):
    """The stage was interrupted or gave up; its last checkpoint is on disk."""


def make_accelerator(config: LoopConfig) -> Accelerator:
    """Device and autocast of a stage. accelerate keeps one precision for a whole process, while each of our stages has its own."""
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=config.mixed_precision)


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """Linear warm-up over ``warmup_steps``, then constant, or a cosine down to 2 % of the peak at the last step."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return config.learning_rate * warm
    progress = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: on CUDA of the stage's allocations; on the CPU of the process so far, other stages included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a question the loop asks between steps, so that it stops with a whole checkpoint."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    previous = {s: signal.signal(s, lambda *_: asked.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def train(
    name: str,
    *,
    parameters: Iterable[torch.nn.Parameter],
    loss_fn: Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]],
    config: LoopConfig,
    state: Mapping[str, Stateful],
    key: str,
    checkpoints: CheckpointStore,
    metrics: MetricStream,
    accelerator: Accelerator,
    after_update: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Run ``config.steps`` updates, continuing from the newest checkpoint made under ``key``.

    Args:
        name: shown in the progress bar.
        parameters: what the optimiser trains.
        loss_fn: draws its batch from the generator and returns ``(loss, detached scalars to log)``; called ``accumulate`` times an update.
        state: everything besides the optimiser and the generator that a checkpoint must hold.
        after_update: called after each applied update (EMA).

    Returns:
        ``mean_images_per_second``, ``mean_step_seconds`` (of the last process that trained), ``peak_memory_mb``, ``final_loss``,
        ``total_skipped_steps``; for a stage that was finished before, what it had then.

    Raises:
        TrainingStopped: interrupted (the checkpoint of the last finished step is saved), or ``max_bad_steps`` non-finite losses in a row.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    start, bad, skipped, figures = _resume(checkpoints, key, state, optimizer, generator)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    meter = _Meter(name, start, config, metrics, accelerator.device)

    def save(step: int) -> None:
        nonlocal figures
        figures = {**meter.figures(), "total_skipped_steps": float(skipped)}
        payload = {"optimizer": optimizer.state_dict(), "generator": generator.get_state(), "bad": bad, "skipped": skipped}
        modules = {k: v.state_dict() for k, v in state.items()}
        checkpoints.save(step, key, {**payload, "figures": figures, "modules": modules})

    with _stop_request() as stop_asked:
        for step in range(start, config.steps):
            rate = learning_rate_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            scalars: Mapping[str, Tensor] = {}
            for _ in range(config.accumulate):
                with accelerator.autocast():
                    loss, scalars = loss_fn(generator)
                accelerator.backward(loss / config.accumulate)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            if torch.isfinite(grad_norm):  # non-finite gradients would poison Adam's moments for good: skip, count, go on
                optimizer.step()
                after_update()
                bad = 0
            else:
                bad, skipped = bad + 1, skipped + 1
            optimizer.zero_grad(set_to_none=True)
            meter.update(step, {"loss": loss.detach(), "grad_norm": grad_norm, **scalars}, rate, skipped)
            done = step + 1
            if bad >= config.max_bad_steps:
                raise TrainingStopped(
                    f"{name}: {bad} steps in a row had a non-finite loss or gradient; lower the learning rate (now {rate:g})."
                )
            if done % config.checkpoint_every == 0 or done == config.steps or stop_asked():
                save(done)
            if stop_asked():
                raise TrainingStopped(f"{name}: interrupted after step {done}; run the same command to continue.")
    meter.bar.close()
    return figures


def _resume(
    checkpoints: CheckpointStore, key: str, state: Mapping[str, Stateful], optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> tuple[int, int, int, dict[str, float]]:
    found = checkpoints.load(key)
    if found is None:
        return 0, 0, 0, {}
    step, saved = found
    optimizer.load_state_dict(saved["optimizer"])
    generator.set_state(saved["generator"])
    for name, part in state.items():
        part.load_state_dict(saved["modules"][name])
    log.info("%s: continuing after step %d", checkpoints.path.name, step)
    return step, saved["bad"], saved["skipped"], saved["figures"]


class _Meter:
    """Progress bar, live figures and throughput. Reads tensors only every ``log_every`` steps: each read is a CPU-GPU sync point."""

    def __init__(self, name: str, start: int, config: LoopConfig, metrics: MetricStream, device: torch.device) -> None:
        self.config, self.metrics, self.device, self.start = config, metrics, device, start
        self.bar = tqdm(total=config.steps, initial=start, desc=name, unit="step", mininterval=2.0, dynamic_ncols=True)
        self.began = self.marked = time.perf_counter()
        self.done = self.marked_step = start
        self.loss = float("nan")

    def update(self, step: int, scalars: Mapping[str, Tensor], rate: float, skipped: int) -> None:
        self.done = step + 1
        self.bar.update()
        if self.done % self.config.log_every and self.done != self.config.steps:
            return
        values = {k: float(v) for k, v in scalars.items()}
        self.loss = values["loss"]
        now = time.perf_counter()
        speed = (self.done - self.marked_step) * self.config.batch_size / max(now - self.marked, 1e-9)
        self.marked, self.marked_step = now, self.done
        self.bar.set_postfix_str(f"loss {self.loss:.4f}, {speed:.0f} images/s")
        self.metrics({**values, "learning_rate": rate, "images_per_second": speed, "skipped_steps": float(skipped)}, self.done)

    def figures(self) -> dict[str, float]:
        steps, seconds = self.done - self.start, time.perf_counter() - self.began
        figures = {"final_loss": self.loss, "peak_memory_mb": peak_memory_mb(self.device)}
        if steps:
            figures |= {"mean_step_seconds": seconds / steps, "mean_images_per_second": steps * self.config.batch_size / seconds}
        return figures
