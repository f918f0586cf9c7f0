"""The training loop: one place for every stage.

A step with a non-finite loss or gradient is skipped, counted and logged. With a fused optimiser (on a GPU) the device decides that by
itself, and the counts are read where values are logged or saved. After ``max_bad_steps`` of them in a row training goes back to its last
good checkpoint with half the learning rates, the companions' too, and other random draws, ``max_rollbacks`` times at most.

Where processes train together (`training.distributed`), each calls `train` with the same arguments. They make the same updates from the
mean of their gradients, and the first one writes and logs. A request to stop that reaches any of them ends all of them.
"""

from __future__ import annotations

import logging
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from hypersd_pipeline.config import Count, Decay, Rate, Seed, Strict
from hypersd_pipeline.draws import Draws
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.checkpoints import CheckpointStore, Identity
from hypersd_pipeline.training.resume import check_restart, continuation

log = logging.getLogger(__name__)

MetricSink = Callable[[dict[str, float], int], None]
"""``log(metrics, step)``: where live metrics go."""


class Stateful(Protocol):
    """Anything with PyTorch's state-dict pair."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@runtime_checkable
class Slowable(Protocol):
    """What trains by an optimiser of its own, at ``factor`` times its configured rate."""

    def slow(self, factor: float) -> None: ...


class LoopConfig(Strict):
    """How a stage is optimised.

    Attributes:
        steps: optimiser updates. batch_size: samples of an update, of all processes together.
        accumulate: passes of each process in an update. A pass of a process has ``batch_size / (accumulate * processes)`` samples.
        learning_rate, schedule, warmup_steps: see `learning_rate_at`. Adafactor multiplies the rate by each tensor's root mean square (0.02
            to 0.05 in Stable Diffusion's UNet), so that AdamW's 1e-6 compares with about 3e-5.
        optimizer: ``adamw`` (fused on a GPU), ``adafactor`` (PyTorch's: a row and a column of moments for each matrix, for training a whole
            UNet) or ``adamw_8bit`` (bitsandbytes', which must be installed; GPU only).
        max_grad_norm: clipping. betas, weight_decay: AdamW's.
        mixed_precision: ``no`` or ``bf16`` (autocast; LoRA gradients in fp16 would need loss scaling, so it is not offered).
        conv_precision: how a CPU with bf16 instructions multiplies inside float32 convolutions. Everything around them stays float32.
        channels_last: layout of the networks' convolutions. A GPU's tensor cores are faster with it in bf16. A CPU is not.
        compile: whole passes by ``torch.compile``, each adapter by itself. It takes minutes at the start.
        prefetch: read and draw the next pass's batches while a pass is computed. The draws are the same. None: on a GPU.
        log_every, checkpoint_every: in updates.
        seed: of every random draw of the stage.
        new_rate_from_here: continue from a checkpoint that was made with another learning rate, schedule or warm-up.
        max_bad_steps, max_rollbacks: after so many non-finite steps in a row the stage goes back to its last good checkpoint with half the
            learning rates. After so many returns it gives up.
    """

    steps: Count
    batch_size: Count
    accumulate: Count = 1
    learning_rate: Rate
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0, le=10**9)
    optimizer: Literal["adamw", "adafactor", "adamw_8bit"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0, le=100)
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e9)
    mixed_precision: Literal["no", "bf16"] = "no"
    conv_precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    prefetch: bool | None = None
    log_every: Count = 10
    checkpoint_every: Count = 100
    seed: Seed = 0
    new_rate_from_here: bool = False
    max_bad_steps: Count = 10
    max_rollbacks: int = Field(default=2, ge=0, le=1000)

    @field_validator("optimizer")
    @classmethod
    def _installed(cls, optimizer: str) -> str:
        if optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
            raise ValueError("adamw_8bit needs bitsandbytes: pip install bitsandbytes, or use adafactor")
        return optimizer

    @model_validator(mode="after")
    def _whole_passes(self) -> LoopConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")
        return self

    def identity(self) -> dict[str, Any]:
        """What the trained weights depend on, but for rounding: a checkpoint stays good when only logging or speed changes."""
        free = {
            "channels_last",
            "compile",
            "prefetch",
            "log_every",
            "checkpoint_every",
            "max_bad_steps",
            "max_rollbacks",
            "new_rate_from_here",
        }
        return self.model_dump(mode="json", exclude=free)


class TrainingStopped(RuntimeError):
    """The stage was interrupted or gave up. Its last checkpoint is on disk."""


def make_accelerator(config: LoopConfig) -> Accelerator:
    """Device, autocast and convolution precision of a stage. Both are kept per process, while each of our stages has its own."""
    AcceleratorState._reset_state()
    _set_convolutions("bf16" if config.conv_precision == "bf16" else "ieee")
    return Accelerator(mixed_precision=config.mixed_precision)


def _set_convolutions(precision: str) -> None:
    torch.backends.mkldnn.conv.fp32_precision = precision  # type: ignore[attr-defined]


@contextmanager
def _exact_convolutions_after() -> Iterator[None]:
    """What comes after a training in the same process (sampling, measuring) is not to be done in its precision."""
    try:
        yield
    finally:
        _set_convolutions("ieee")


def make_optimizer(parameters: list[torch.nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
    """The main optimiser of a stage."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    match config.optimizer:
        case "adafactor":
            return torch.optim.Adafactor(parameters, **options)
        case "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(parameters, betas=config.betas, **options)  # type: ignore[no-any-return]
        case _:
            return adamw(parameters, betas=config.betas, **options)


def adamw(parameters: list[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """AdamW, fused where `can_fuse` says so."""
    return torch.optim.AdamW(parameters, fused=True if can_fuse(parameters) else None, **options)


def can_fuse(parameters: Sequence[Tensor]) -> bool:
    """Whether AdamW is to be fused: on a GPU. On a CPU the fused one rounds a little differently and hardly saves anything."""
    return bool(parameters) and all(p.is_cuda for p in parameters)


class Steps:
    """Steps of optimisers that are taken only where all gradients are finite, and the count of those that were left out.

    Fused optimisers decide it on the device, so that the CPU need not wait for the gradients. Others wait.

    Attributes:
        waits: whether `take` waits for the device, so that the counts are up to date. Otherwise they are after `read`.
        skipped: steps left out so far. in_a_row: of them, those since the last step that was taken.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self.waits = not all(optimizer.defaults.get("fused") for optimizer in self.optimizers)
        self._counts: Tensor | None = None
        self.skipped = self.in_a_row = 0

    def take(self, finite: Tensor) -> bool:
        """Step where ``finite``, a bool on the device, is true. Moments and weights stay as they are where it is not.

        Returns:
            whether the step was taken, or may have been, where nobody waits for the answer.
        """
        if self.waits:
            taken = bool(finite)
            self.set(self.skipped + (not taken), 0 if taken else self.in_a_row + 1)
        else:
            taken, bad = True, (~finite).float()
            counts = torch.tensor([self.skipped, self.in_a_row], device=finite.device) if self._counts is None else self._counts
            self._counts = torch.stack([counts[0] + ~finite, torch.where(finite, 0, counts[1] + 1)])
        for optimizer in self.optimizers:
            if not self.waits:
                optimizer.found_inf = bad  # type: ignore[attr-defined]
            if taken:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return taken

    def read(self) -> None:
        """Bring the counts up to date. Waits for the device."""
        if self._counts is not None:
            self.skipped, self.in_a_row = (int(count) for count in self._counts.tolist())

    def count(self, device: torch.device) -> Tensor:
        """Steps left out so far, a scalar. Nobody waits for it."""
        return torch.tensor(float(self.skipped), device=device) if self._counts is None else self._counts[0].float()

    def set(self, skipped: int, in_a_row: int) -> None:
        """Set the counts."""
        self.skipped, self.in_a_row, self._counts = skipped, in_a_row, None


def learning_rate_at(step: int, config: LoopConfig) -> float:
    """Linear warm-up over ``warmup_steps``, then constant, or a cosine down to 2 % of the peak at the last step."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return config.learning_rate * warm
    progress = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: on CUDA of the stage's allocations. On the CPU of the process so far, other stages included."""
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
    key: str | Identity,
    checkpoints: CheckpointStore,
    metrics: MetricSink,
    accelerator: Accelerator,
    after_update: Callable[[], None] = lambda: None,
    companions: Mapping[str, torch.optim.Optimizer] | None = None,
    watch: Callable[[Mapping[str, float], int], None] = lambda values, step: None,
    will_log: Callable[[bool], None] = lambda due: None,
    constants: Mapping[str, float] | None = None,
    finished: Callable[[int], bool] = lambda step: False,
) -> dict[str, float]:
    """Run ``config.steps`` updates, continuing from the newest checkpoint made under ``key``.

    Where there is none, a training whose identity differs only in what may change is continued (see `training.resume`). Otherwise the
    stage starts anew and says what is different.

    Args:
        name: shown in the progress bar.
        parameters: what the optimiser trains.
        loss_fn: draws its batch from the generator and returns ``(loss, detached scalars to log)``. Called ``accumulate`` times an update.
        state: everything besides the optimisers and the generator that a checkpoint must hold.
        key: what the weights depend on. With an `Identity` a later run can say what has changed.
        after_update: called after each applied update (EMA).
        companions: optimisers of opponents (a discriminator), whose gradients ``loss_fn`` leaves in their parameters. They step with the
            main one: all of them, or none when any gradient is not finite.
        watch: called with the logged values and the step, for alarms.
        will_log: told before each update whether its values are logged, for what is measured only then.
        constants: metrics that are known before the training and belong into its report.
        finished: asked with the number of updates done, before each one and after the last, whether to end here. What it remembers belongs
            into ``state``.

    Returns:
        ``mean_images_per_second``, ``mean_step_seconds`` (of the last process that trained), ``peak_memory_mb``, ``final_loss``,
        ``total_skipped_steps``, ``total_rollbacks``, ``train_seconds`` (with those before an interruption) and ``constants``. For a stage
        that was finished before, what it had then.

    Raises:
        UserError: another process trains the same stage, or see `training.resume.check_restart`.
        TrainingStopped: interrupted (the checkpoint of the last finished step is saved), or non-finite once more after the last rollback.
    """
    parameters = list(parameters)
    main = make_optimizer(parameters, config)
    run = _Run(name, config, {"main": main, **(companions or {})}, dict(state), key, checkpoints, dict(constants or {}))
    metrics = distributed.by_first(metrics)
    with distributed.held_by_first(checkpoints.locked(name)), _exact_convolutions_after(), _stop_request() as stop_asked:
        step = run.resume()
        distributed.agree(f"{name}: the step to continue from", step)
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(accelerator.device)
        meter = _Meter(name, step, config, metrics, watch, accelerator.device)
        while not finished(step) and step < config.steps:
            rate = run.set_learning_rate(step)
            will_log(meter.is_due(step + 1))
            loss, scalars = _backward(loss_fn, run.generator, accelerator, config.accumulate)
            grad_norm, applied = run.apply()
            if applied:
                after_update()
            step = _count(run, meter, step + 1, {"loss": loss, "grad_norm": grad_norm, **scalars}, rate)
            _keep(run, meter, step, stop_asked())
        if run.saved != step or meter.done > meter.start:  # once more after `finished` has had its last word
            run.save(step, meter.summary() if meter.done > meter.start else run.report)
        meter.bar.close()
        distributed.wait()
    return run.report


def _backward(
    loss_fn: Callable[[torch.Generator], tuple[Tensor, Mapping[str, Tensor]]], generator: Draws, accelerator: Accelerator, accumulate: int
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The passes of one update, whose gradients add up in the parameters. The last pass's loss, detached, and its scalars."""
    for _ in distributed.passes(generator, accumulate):
        with accelerator.autocast():
            loss, scalars = loss_fn(generator)
        accelerator.backward(loss / accumulate)
    return loss.detach(), scalars


def _count(run: _Run, meter: _Meter, step: int, scalars: Mapping[str, Tensor], rate: float) -> int:
    """Count and log an update. The step to go on from, which is an earlier one after too many bad steps in a row."""
    if meter.is_due(step) or step % run.config.checkpoint_every == 0:
        run.read()
    meter.update(step, scalars, rate, run.skipped)
    if run.bad >= run.config.max_bad_steps:
        step = run.roll_back(rate)
        meter.rewind(step)
    return step


def _keep(run: _Run, meter: _Meter, step: int, asked: bool) -> None:
    """Save a checkpoint where one is due, and where any process was asked to stop. Then all of them stop."""
    due = step % run.config.checkpoint_every == 0 and run.bad == 0  # what is saved on schedule is good: there it goes back to
    stop = distributed.anywhere(asked)
    if due or stop:
        run.save(step, meter.summary())
    if stop:
        distributed.wait()
        raise TrainingStopped(f"{run.name}: interrupted after step {step}; run the same command to continue.")


class _Run:
    """What a checkpoint holds, and how it is saved, restored and rolled back."""

    def __init__(
        self,
        name: str,
        config: LoopConfig,
        optimizers: dict[str, torch.optim.Optimizer],
        state: dict[str, Stateful],
        key: str | Identity,
        checkpoints: CheckpointStore,
        constants: dict[str, float],
    ) -> None:
        self.name, self.config, self.optimizers, self.state = name, config, optimizers, state
        self.identity = key if isinstance(key, Identity) else None
        self.key, self.checkpoints, self.constants = key.key if isinstance(key, Identity) else key, checkpoints, constants
        self.began, self.seconds_before = time.perf_counter(), 0.0
        self.generator = Draws()
        self.generator.manual_seed(config.seed)
        self.companion_rates = {k: [g["lr"] for g in o.param_groups] for k, o in optimizers.items() if k != "main"}
        self.steps = Steps(optimizers.values())
        self.rollbacks = self.warned = 0
        self.finite: Tensor | None = None  # of which optimisers the gradients were, at the last step where not all were
        self.saved: int | None = None
        self.report: dict[str, float] = {}

    def set_learning_rate(self, step: int) -> float:
        """Of the main optimiser, which follows the schedule. Companions keep theirs, but for the halving of a rollback."""
        halved = 0.5**self.rollbacks
        rate = learning_rate_at(step, self.config) * halved
        for group in self.optimizers["main"].param_groups:
            group["lr"] = rate
        for name, rates in self.companion_rates.items():
            for group, own in zip(self.optimizers[name].param_groups, rates, strict=True):
                group["lr"] = own * halved
        for part in self.state.values():  # an opponent whose optimiser is its own
            if isinstance(part, Slowable):
                part.slow(halved)
        return rate

    def apply(self) -> tuple[Tensor, bool]:
        """Clip, and step all optimisers or none: non-finite gradients would poison Adam's moments for good."""
        groups = [[p for g in o.param_groups for p in g["params"]] for o in self.optimizers.values()]
        distributed.average_gradients(p for group in groups for p in group)
        norms = [torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm) for parameters in groups]
        each = torch.isfinite(torch.stack(norms))
        self.finite = each if self.finite is None else torch.where(each.all(), self.finite, each)
        applied = self.steps.take(each.all())
        if self.steps.waits:
            self.read()
        return norms[0], applied

    @property
    def bad(self) -> int:
        """Steps in a row that were left out."""
        return self.steps.in_a_row

    @property
    def skipped(self) -> int:
        """Steps that were left out."""
        return self.steps.skipped

    @property
    def bad_in(self) -> str:
        """Whose gradients were not finite in the last such step."""
        known = [True] * len(self.optimizers) if self.finite is None else self.finite.tolist()
        return ", ".join(name for name, finite in zip(self.optimizers, known, strict=True) if not finite)

    def read(self) -> None:
        """Learn how many steps were left out, and say where the first of a row was. Waits for the device."""
        self.steps.read()
        if self.skipped > self.warned and self.bad <= self.skipped - self.warned:
            log.warning("%s: a non-finite loss or gradient (%s); such steps are skipped and counted.", self.name, self.bad_in)
        self.warned = self.skipped

    def save(self, step: int, summary: Mapping[str, float]) -> None:
        self.read()
        seconds = self.seconds_before + time.perf_counter() - self.began
        counts = {"total_skipped_steps": float(self.skipped), "total_rollbacks": float(self.rollbacks)}
        self.report = {**self.constants, **summary, **counts, "train_seconds": seconds}
        self.saved = step
        if not distributed.is_first():
            return
        payload = {
            "optimizers": {k: v.state_dict() for k, v in self.optimizers.items()},
            "generator": self.generator.get_state(),
            "counts": {"bad": self.bad, "skipped": self.skipped, "rollbacks": self.rollbacks},
            "report": self.report,
            "seconds": seconds,
            "modules": {k: v.state_dict() for k, v in self.state.items()},
        }
        self.checkpoints.save(step, self.key, payload, self.identity)

    def resume(self) -> int:
        """The step to continue from.

        Raises:
            UserError: see `check_restart`.
        """
        found = self._load(self.key)
        if found is None:
            found = self._continue_another()
        if found is not None:
            log.info("%s: continuing after step %d", self.checkpoints.path.name, found)
            return found
        if self.identity is not None:
            check_restart(self.checkpoints.path.name, self.checkpoints, self.identity)
        return 0

    def _load(self, key: str) -> int | None:
        """Restore the newest checkpoint of a key that fits. One that does not is passed over as damaged."""

        def restored(saved: dict[str, Any]) -> bool:
            self._restore(0, saved)
            return True

        found = self.checkpoints.load(key, accept=restored)
        if found is None:
            return None
        self.saved, self.seconds_before = found[0], float(found[1].get("seconds", 0.0))
        return found[0]

    def _continue_another(self) -> int | None:
        """Restore a training of another key that differs only in what may change."""
        if self.identity is None:
            return None
        found = continuation(self.checkpoints, self.identity, new_rate=self.config.new_rate_from_here)
        if found is None:
            return None
        made, changes = found
        step = self._load(made.key)
        said = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changes.items())
        log.info("%s: goes on from step %s of an earlier training (%s)", self.checkpoints.path.name, step, said)
        self.saved = None  # under this key there is no checkpoint yet
        return step

    def _restore(self, step: int, saved: dict[str, Any]) -> int:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        self.generator.set_state(saved["generator"])
        for name, part in self.state.items():
            part.load_state_dict(saved["modules"][name])
        counts = saved["counts"]
        self.steps.set(counts["skipped"], counts["bad"])
        self.warned, self.rollbacks, self.report = counts["skipped"], counts["rollbacks"], saved["report"]
        self.saved = step
        return step

    def roll_back(self, rate: float) -> int:
        """Go back to the last good checkpoint. The learning rate is halved and the draws are others, or the same would happen again."""
        bad, skipped, rollbacks = self.bad, self.skipped, self.rollbacks
        advice = f"{self.name}: {bad} steps in a row had a non-finite loss or gradient ({self.bad_in})"
        if rollbacks >= self.config.max_rollbacks:
            raise TrainingStopped(
                f"{advice}, after {rollbacks} returns to an earlier checkpoint; lower the learning rate (of main: now {rate:g})."
            )
        found = self.checkpoints.load(self.key, accept=lambda saved: saved["counts"]["bad"] == 0)
        if found is None:
            raise TrainingStopped(f"{advice}, before the first checkpoint; lower the learning rate (of main: now {rate:g}).")
        step = self._restore(*found)
        distributed.wait()
        distributed.by_first(self.checkpoints.discard_after)(self.key, step)
        self.steps.set(skipped, 0)
        self.warned, self.rollbacks = skipped, rollbacks + 1
        self.generator.manual_seed(int(np.random.SeedSequence([self.config.seed, self.rollbacks, step]).generate_state(1)[0]))
        log.warning("%s; back to the checkpoint of step %d, with the learning rates halved (rollback %d).", advice, step, self.rollbacks)
        return step


class _Meter:
    """Progress bar, live metrics and throughput. Reads tensors only every ``log_every`` steps: each read is a CPU-GPU sync point."""

    def __init__(
        self,
        name: str,
        start: int,
        config: LoopConfig,
        metrics: MetricSink,
        watch: Callable[[Mapping[str, float], int], None],
        device: torch.device,
    ) -> None:
        self.config, self.metrics, self.watch, self.device = config, metrics, watch, device
        self.bar = tqdm(
            total=config.steps,
            initial=start,
            desc=name,
            unit="step",
            mininterval=2.0,
            dynamic_ncols=True,
            disable=not distributed.is_first(),
        )
        self.loss = float("nan")
        self.rewind(start)

    def rewind(self, step: int) -> None:
        """Count and time from this step on."""
        self.began = self.marked = time.perf_counter()
        self.start = self.done = self.marked_step = self.bar.n = step

    def is_due(self, done: int) -> bool:
        """Whether the values after so many updates are logged."""
        return done % self.config.log_every == 0 or done == self.config.steps

    def update(self, done: int, scalars: Mapping[str, Tensor], rate: float, skipped: int) -> None:
        self.done = done
        self.bar.update()
        if not self.is_due(done):
            return
        values = distributed.means(scalars)
        self.loss = values["loss"]
        now = time.perf_counter()
        speed = (self.done - self.marked_step) * self.config.batch_size / max(now - self.marked, 1e-9)
        self.marked, self.marked_step = now, self.done
        self.bar.set_postfix_str(f"loss {self.loss:.4f}, {speed:.0f} images/s")
        self.metrics({**values, "learning_rate": rate, "images_per_second": speed, "skipped_steps": float(skipped)}, self.done)
        self.watch(values, self.done)

    def summary(self) -> dict[str, float]:
        steps, seconds = self.done - self.start, time.perf_counter() - self.began
        summary = {"final_loss": self.loss, "peak_memory_mb": peak_memory_mb(self.device)}
        if steps:
            summary |= {"mean_step_seconds": seconds / steps, "mean_images_per_second": steps * self.config.batch_size / seconds}
        return summary
