"""How the student comes to a prediction: along the teacher's trajectory, by its own few steps from noise, or from a noised image.

A rollout draws its batch first, on the CPU and from the stage's generator, and computes on the device afterwards. So all of a stage's
batches are drawn before the first network is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hypersd_pipeline.conditioning import Conditioning, moved
from hypersd_pipeline.config import Steps, Strict, Timestep
from hypersd_pipeline.data.cache import SplitCache
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.diffusion.grids import check_grid
from hypersd_pipeline.draws import rand, randint, randn
from hypersd_pipeline.models.folded import in_plain_operations
from hypersd_pipeline.objectives import consistency, continuous, feedback
from hypersd_pipeline.perception.protocol import Instances
from hypersd_pipeline.training.terms.base import Context, Prediction, Rows
from hypersd_pipeline.training.terms.consistency import ConsistencyConfig
from hypersd_pipeline.training.terms.perceptual import PerceptualConfig


class SampleConfig(Strict):
    """How the student samples from pure noise what its terms judge.

    Attributes:
        steps: of the student's own grid (trailing).
        gradient_steps: how many of the last steps may be the one with gradient. One of them is drawn per pass.
        timestep: what the student is told about pure noise, with one step. None is T - 1. An eps model's error is multiplied by
            ``sigma / alpha``: 14.6 at the paper's 999 for the LoRA, 5.1 at its 800 for the dedicated network. A LoRA that is told another
            than T - 1 needs it at one step (``timesteps=[800]``), and has its usual grid at more.
    """

    steps: Steps = 1
    gradient_steps: Steps = 1
    timestep: Timestep | None = None

    @model_validator(mode="after")
    def _one_step_only(self) -> SampleConfig:
        if self.timestep is not None and self.steps != 1:
            raise ValueError(f"timestep is for one step only, and steps is {self.steps}")
        if self.gradient_steps > self.steps:
            raise ValueError(f"gradient_steps is {self.gradient_steps}, more than the {self.steps} of steps; lower it")
        return self


class Rollout(Protocol):
    """Draws a batch, and lets the student predict from it."""

    def draw(self, generator: torch.Generator) -> Any:
        """Everything random that is known before a network runs. ``generator`` is on the CPU."""
        ...

    def predict(self, batch: Any, generator: torch.Generator) -> Prediction:
        """The student's prediction, with its graph. The student is called last, as gradient checkpointing needs it."""
        ...


@dataclass(frozen=True)
class TrajectoryBatch:
    """What `Trajectory` draws: noised images and where each of them goes.

    Attributes:
        x_tn: ``[b, c, h, w]``. times: its four timesteps. guidance: of the teacher's step ``[b, 1, 1, 1]``.
        cond, uncond: of the batch. ``uncond`` is None where the solver has its guidance baked in.
        real: the data at ``t_end``, with the same noise, where a discriminator takes them for real.
        steps: of the solver's own further way, where it makes the target.
    """

    x_tn: Tensor
    times: consistency.Timesteps
    guidance: Tensor
    cond: Conditioning
    uncond: Conditioning | None
    real: Tensor | None = None
    steps: int = 0


class Trajectory:
    """The student jumps along its segment. Its target is the averaged student after one step of the teacher (Hyper-SD algorithm 1).

    Args:
        with_features: take the encoder's features of ``x_tn`` from the teacher's own pass, for a discriminator.
        with_data: give the discriminator data for real, not the target.

    Raises:
        UserError: the solver's grid misses a segment boundary.
    """

    def __init__(self, config: ConsistencyConfig, context: Context, *, with_features: bool = False, with_data: bool = False) -> None:
        self.config, self.context, self.adapters = config, context, context.adapters
        self.process = process = context.adapters.process
        self.grid, self.bounds = process.solver_grid(config.solver_points), process.boundaries(config.segments)
        check_grid(self.grid, self.bounds)
        self.batch = config.batch or context.batch
        self.solver = context.base if config.teacher == "base" else self.adapters.denoiser("previous")
        self.target_network = self.adapters.denoiser("ema" if config.target == "ema" else "student")
        self.passed = 0
        self.with_features = with_features and config.teacher == "base"
        self.with_data = with_data

    def draw(self, generator: torch.Generator) -> TrajectoryBatch:
        """See `Rollout`."""
        config, data, device = self.config, self.context.data, self.context.device
        picks = draw_rows(data, self.batch, generator)
        x0 = data.sample(picks, generator)
        cond = data.conditioning(picks, generator)
        uncond = moved(data.unconditional(self.batch, cond.sizes), device) if config.teacher == "base" else None
        z = consistency.offset_noise(tuple(x0.shape), config.offset_noise, generator)
        drawn = consistency.sample_timesteps(self.batch, self.grid, self.bounds, generator, starts=config.starts, ends=config.ends)
        times = consistency.Timesteps(*(moved(t, device) for t in (drawn.t_n, drawn.t_prev, drawn.t_b, drawn.t_end)))
        low, high = config.guidance
        guidance = (low + (high - low) * rand((self.batch,), generator)).view(-1, 1, 1, 1)
        x0, z, guidance = moved(x0, device), moved(z, device), moved(guidance, device)
        x_tn = consistency.noisy_input(x0, z, times.t_n, self.process, pure_noise=config.pure_noise)
        real = self.process.add_noise(x0, z, times.t_end) if self.with_data else None
        steps = consistency.longest_way(drawn, self.grid) if config.target == "solver" else 0
        return TrajectoryBatch(x_tn, times, guidance, moved(cond, device), uncond, real, steps)

    def predict(self, batch: TrajectoryBatch, generator: torch.Generator) -> Prediction:
        """See `Rollout`. Order: teacher, target network, student."""
        if self.config.target == "tangent":
            return self._continuous(batch)
        target, features = self._target(batch)
        times = batch.times
        sample = self.context.student.jump(batch.x_tn, times.t_n, times.t_end, batch.cond)
        return Prediction(
            sample,
            times.t_end,
            batch.x_tn,
            times.t_n,
            batch.cond,
            batch.uncond,
            target=target,
            real=target if batch.real is None else batch.real,
            features=features,
        )

    def _continuous(self, batch: TrajectoryBatch) -> Prediction:
        """The student's clean sample, and the one that its tangent along the teacher's ODE leads to."""
        x_t, t, cond = batch.x_tn, batch.times.t_n, batch.cond
        solver = self.solver if batch.uncond is None else self.solver.guided(batch.uncond, batch.guidance)
        velocity = continuous.teacher_velocity(solver, x_t, t, cond)
        if self.config.tangent_span:
            seen, along = continuous.velocity_between(self.target_network, x_t, t, cond, velocity, self.config.tangent_span)
        else:
            with in_plain_operations(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no derivative along a direction
                seen, along = continuous.velocity_along(self.target_network, x_t, t, cond, velocity)
        angle = self.process.angle(t, x_t)
        step = continuous.normalised(continuous.tangent(seen, along, x_t, velocity, angle, self._warm()))
        target = continuous.clean_target(seen, step, x_t, angle).to(x_t.dtype)
        x0, _ = self.context.student.predict(x_t, t, cond)
        return Prediction(x0, batch.times.t_end, x_t, t, cond, batch.uncond, target=target)

    def _warm(self) -> float:
        """How much of the tangent's second half counts in this pass."""
        update, self.passed = self.passed // self.context.passes, self.passed + 1
        return min(1.0, update / self.config.tangent_warmup) if self.config.tangent_warmup else 1.0

    def state_dict(self) -> dict[str, int]:
        """The passes so far, by which the tangent is warmed up."""
        return {"passed": self.passed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore what `state_dict` gave."""
        self.passed = state_dict["passed"]

    def _target(self, batch: TrajectoryBatch) -> tuple[Tensor, Tensor | None]:
        """The target at ``t_end``, and the base network's features of ``x_tn`` where they are wanted."""
        solver = self.solver if batch.uncond is None else self.solver.guided(batch.uncond, batch.guidance)
        features: Tensor | None = None
        if self.with_features:
            with self.adapters.watch_features() as seen:
                xhat = consistency.solver_step(solver, batch.x_tn, batch.times, batch.cond)
            features = seen[0].chunk(2)[1]  # of the halves without and with the prompt
        else:
            xhat = consistency.solver_step(solver, batch.x_tn, batch.times, batch.cond)
        if self.config.target == "solver":
            grid = moved(self.grid, xhat.device)
            return consistency.solver_target(solver, xhat, batch.times, batch.cond, grid=grid, steps=batch.steps), features
        return consistency.consistency_target(self.target_network, xhat, batch.times, batch.cond), features


@dataclass(frozen=True)
class SampleBatch:
    """What `Samples` draws: noise with its prompts, and what else the terms need."""

    z: Tensor
    cond: Conditioning
    uncond: Conditioning | None
    prompts: Sequence[str]
    target: Tensor | None
    real: Tensor | None


class Samples:
    """The student samples from pure noise on its own few-step grid. One of the last steps keeps its graph and ends at the clean sample.

    Args:
        unconditional, prompts, real, anchor: whether a term needs them. What nobody needs is not made.
    """

    def __init__(self, config: SampleConfig, context: Context, *, unconditional: bool, prompts: bool, real: bool, anchor: bool) -> None:
        self.config, self.context = config, context
        self.unconditional, self.prompts, self.real, self.anchor = unconditional, prompts, real, anchor
        self.timesteps = sample_timesteps(config, context.student)

    def draw(self, generator: torch.Generator) -> SampleBatch:
        """See `Rollout`. Noise and prompts come from the stored pairs, where there are any."""
        data, pairs, size, device = self.context.data, self.context.pairs, self.context.batch, self.context.device
        if pairs is None:
            rows, target = draw_rows(data, size, generator), None
            z = randn((size, *shape_of(data, rows)), generator)
        else:
            picks = randint(0, len(pairs.rows), (size,), generator)
            rows, z, target = pairs.rows[picks], pairs.noise[picks], moved(pairs.target[picks], device)
        cond = data.conditioning(rows)
        return SampleBatch(
            moved(z, device),
            moved(cond, device),
            moved(data.unconditional(size, cond.sizes), device) if self.unconditional else None,
            data.captions(rows) if self.prompts else (),
            target,
            moved(data.sample(rows, generator), device) if self.real else None,
        )

    def predict(self, batch: SampleBatch, generator: torch.Generator) -> Prediction:
        """See `Rollout`."""
        student, timesteps = self.context.student, self.timesteps
        at = gradient_step(len(timesteps), self.config.gradient_steps, generator)
        x_t = feedback.advance(student, batch.z, timesteps[: at + 1], batch.cond)
        anchor: Tensor | None = None
        if self.anchor:
            with torch.no_grad():
                anchor = self.context.base.clean(x_t, timesteps[at], batch.cond)
        sample = student.clean(x_t, timesteps[at], batch.cond)
        t = torch.full((len(x_t),), timesteps[at], device=x_t.device)
        return Prediction(
            sample,
            torch.zeros_like(t),
            x_t,
            t,
            batch.cond,
            batch.uncond,
            batch.prompts,
            target=batch.target,
            real=batch.real,
            anchor=anchor,
        )


@dataclass(frozen=True)
class ImageBatch:
    """What `NoisedImages` draws: clean latents of real images, their conditioning, and their instances."""

    latents: Tensor
    cond: Conditioning
    instances: Sequence[Instances]


class NoisedImages:
    """Real images are noised to a point of the student's grid, come back to a later one without gradient, and then to the clean sample."""

    def __init__(self, config: PerceptualConfig, sample: SampleConfig, context: Context) -> None:
        assert context.annotated is not None
        self.config, self.sample, self.context, self.annotated = config, sample, context, context.annotated
        self.rows = context.annotated.annotated()
        self.timesteps = sample_timesteps(sample, context.student)

    def draw(self, generator: torch.Generator) -> ImageBatch:
        """See `Rollout`."""
        data, device = self.context.data, self.context.device
        picks = self.rows[randint(0, len(self.rows), (self.config.batch,), generator)]
        clean = moved(data.sample(picks, generator), device)
        return ImageBatch(clean, moved(data.conditioning(picks), device), [self.annotated.instances(int(i)) for i in picks])

    def predict(self, batch: ImageBatch, generator: torch.Generator) -> Prediction:
        """See `Rollout`."""
        student, start = self.context.student, self.config.start(len(self.timesteps))
        end = gradient_step(len(self.timesteps), self.sample.gradient_steps, generator, after=start)
        z = moved(randn(batch.latents.shape, generator), batch.latents.device).to(batch.latents)
        at = torch.full((len(z),), self.timesteps[start], device=z.device)
        noised = student.process.add_noise(batch.latents, z, at)
        x_t = feedback.advance(student, noised, self.timesteps[start : end + 1], batch.cond)
        t = torch.full_like(at, self.timesteps[end])
        sample = student.clean(x_t, self.timesteps[end], batch.cond)
        return Prediction(sample, torch.zeros_like(t), x_t, t, batch.cond, instances=batch.instances)


def draw_rows(data: Rows, count: int, generator: torch.Generator) -> Tensor:
    """Row numbers for a batch, int64 ``[count]``. With aspect-ratio buckets they are of one, which is drawn by its number of rows.

    All passes and processes of an update have the same bucket.
    """
    if not (isinstance(data, SplitCache) and data.bucket_shapes):
        return randint(0, len(data), (count,), generator)
    alike = data.alike(int(randint(0, len(data), (), generator)))
    return alike[randint(0, len(alike), (count,), generator)]


def shape_of(data: Rows, rows: Tensor) -> tuple[int, int, int]:
    """``(c, h, w)`` of the latents of rows that `draw_rows` has drawn."""
    return data.shape_of(int(rows[0])) if isinstance(data, SplitCache) else data.latent_shape


def sample_timesteps(config: SampleConfig, student: Denoiser) -> list[int]:
    """The falling grid that the student samples on."""
    if config.timestep is not None:
        return [config.timestep]
    return student.process.trailing_timesteps(config.steps).tolist()  # type: ignore[no-any-return]


def gradient_step(count: int, gradient_steps: int, generator: torch.Generator, after: int = -1) -> int:
    """One of a grid's last ``gradient_steps`` of ``count``, later than the point ``after`` where there is a later one.

    Nothing is drawn where there is no choice.
    """
    first = min(max(count - gradient_steps, after + 1, 0), count - 1)
    return first if first == count - 1 else int(randint(first, count, (), generator))
