"""What tests of stages share: a training split in memory, networks that are written out, and ways to look into a stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.data.trajectories import NoisePairs
from hypersd_pipeline.diffusion.denoiser import Denoiser, Network
from hypersd_pipeline.diffusion.process import PredictionType, Process
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.perception.protocol import Instances
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS
from hypersd_pipeline.training.rollouts import SampleBatch, SampleConfig, Samples
from hypersd_pipeline.training.stage import Stage, Weighted
from hypersd_pipeline.training.terms import Context

CPU = torch.device("cpu")
CONF = Path(__file__).parents[1] / "conf"
LORA = {"rank": 2, "target_modules": ("to_q", "to_v", "conv1")}
LOOP = {"steps": 4, "batch_size": 4, "learning_rate": 0.01}
FEEDBACK = {"held_out": {"kind": "laion_aesthetic"}, "guard": {"every": 2, "prompts": 4}, "test_images": 4}
"""What a feedback stage needs besides."""


def parameters(env: str = "base") -> dict[str, Any]:
    """The parameters of an environment of ``conf/``."""
    return ProjectConfigLoader(str(CONF), env=env, **{**CONFIG_LOADER_ARGS, "default_run_env": env})["parameters"]


def process(prediction_type: PredictionType = "epsilon") -> Process:
    """Stable Diffusion's."""
    return Process.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, prediction_type)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Rows:
    """A training split in memory: latents ``[n, c, h, w]`` that are the same at each draw, and the conditioning of each."""

    def __init__(self, latents: Tensor, cond: Conditioning, uncond: Conditioning) -> None:
        self.latents, self.cond, self.uncond = latents, cond, uncond

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return tuple(self.latents.shape[1:])

    def sample(self, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.latents[indices]

    def conditioning(self, indices: Tensor, generator: torch.Generator | None = None) -> Conditioning:
        return self.cond[indices]

    def captions(self, indices: Tensor, generator: torch.Generator | None = None) -> list[str]:
        return [f"caption {int(i)}" for i in indices]

    def unconditional(self, n: int, sizes: Tensor | None = None) -> Conditioning:
        return self.uncond.expand(n)


def rows(n: int = 8, shape: tuple[int, int, int] = (4, 8, 8), seed: int = 3) -> Rows:
    """Random rows for the tiny SD1.5 teacher."""
    g = generator(seed)
    cond, uncond = (Conditioning(torch.randn(m, 5, 32, generator=g)) for m in (n, 1))
    return Rows(torch.randn(n, *shape, generator=g), cond, uncond)


def pairs(n: int = 8, shape: tuple[int, int, int] = (4, 8, 8)) -> NoisePairs:
    """Random noise, targets and rows."""
    g = generator(4)
    noise, target = (torch.randn(n, *shape, generator=g) for _ in range(2))
    return NoisePairs(noise, target, torch.randint(8, (n,), generator=g))


class Masked:
    """Every row has one instance: a square of an image with 64 pixels a side."""

    def __init__(self, n: int) -> None:
        self.n = n

    def annotated(self) -> Tensor:
        return torch.arange(self.n)

    def instances(self, index: int) -> Instances:
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        mask[:, 10:30, 10:30] = True
        return Instances(mask, torch.zeros(1, dtype=torch.int64))


class Networks:
    """Networks that are written out, in the place of one network and its adapters. ``base`` is the one without an adapter."""

    def __init__(self, process: Process, **networks: Network) -> None:
        self.process, self.networks, self.names = process, networks, tuple(networks)

    def denoiser(self, name: str | None) -> Denoiser:
        return Denoiser(self.networks[name or "base"], self.process)

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        return list(self.networks[name].parameters())  # type: ignore[attr-defined]


def context(adapters: Any, data: Any, batch: int = 4, student: str | Denoiser = "student", **more: Any) -> Context:
    """What a stage on these adapters is built from."""
    student = adapters.denoiser(student) if isinstance(student, str) else student
    return Context(adapters, student, adapters.denoiser(None), data, data.latent_shape, batch=batch, device=CPU, **more)


def moved(adapters: AdaptedBackbone, *names: str, scale: float = 0.05, seed: int = 10) -> None:
    """Adapters away from zero, where B = 0 would hide half of the gradients."""
    with torch.no_grad():
        for i, name in enumerate(names):
            for parameter in adapters.parameters(name):
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator(seed + i)))


def term_of(stage: Stage, kind: type) -> Any:
    """The stage's term of a class."""
    return next(term for _, terms in stage.parts for _, term in terms if isinstance(term, kind))


def passes(adapters: AdaptedBackbone) -> list[tuple[str | None, int, bool]]:
    """A list to which each whole pass adds the adapter in use, the size of its batch, and whether it keeps its graph."""
    seen: list[tuple[str | None, int, bool]] = []
    layer = adapters._layers[0]
    adapters.backbone.module.register_forward_hook(
        lambda module, inputs, output: seen.append(
            (None if layer._disable_adapters else layer._active_adapter[0], len(inputs[0]), torch.is_grad_enabled())
        )
    )
    return seen


def sampled(stage: Stage, batch: SampleBatch) -> Stage:
    """The stage, whose samples are made from this batch at each call."""
    (rollout,) = (r for r, _ in stage.parts if isinstance(r, Samples))
    rollout.draw = lambda generator: batch  # type: ignore[method-assign]
    return stage


def sample_batch(n: int = 2, **more: Any) -> SampleBatch:
    """Noise with prompts, for the tiny SD1.5 teacher."""
    g = generator(3)
    cond, uncond = (Conditioning(torch.randn(n, 5, 32, generator=g)) for _ in range(2))
    z, real = (torch.randn(n, 4, 8, 8, generator=g) for _ in range(2))
    return SampleBatch(z, cond, uncond, **{"prompts": [], "target": None, "real": real, **more})


def at_the_sample(
    x: Tensor, terms: Sequence[Weighted], batch: SampleBatch | None = None, decode: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What terms make of ``x``, seen at ``x`` itself, which is all that the student puts out: gradient, loss and scalars."""
    sample = torch.nn.Parameter(x.clone())
    networks = Networks(process("sample"), student=lambda x_t, t, cond: sample, base=lambda x_t, t, cond: x_t)
    rollout = Samples(SampleConfig(), context(networks, rows()), unconditional=True, prompts=True, real=True, anchor=False)
    stage = sampled(Stage([(rollout, terms)], decode), batch or sample_batch(len(x)))
    loss, scalars = stage(generator())
    loss.backward()
    assert sample.grad is not None
    return sample.grad, loss, scalars
