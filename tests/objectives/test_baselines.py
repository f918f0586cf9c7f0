"""Each baseline's loss, with the settings of conf/base, against a value written out by hand on a toy network."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from kedro.config import OmegaConfigLoader

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.schedule import Schedule
from hypersd_pipeline.objectives import tscd
from hypersd_pipeline.pipelines.tscd.config import StageOverrides, TscdDefaults
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS
from hypersd_pipeline.training.distillation import DistillationStep, StageConfig

SCHEDULE = Schedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000})
A, S = SCHEDULE.alphas, SCHEDULE.sigmas
CONF = Path(__file__).parents[2] / "conf"


class Toy:
    """Networks ``eps = a x + 0.1 c``, handed out as an AdaptedUNet does, one ``a`` per adapter; c is the conditioning's first number."""

    slopes: ClassVar = {None: 0.6, "previous": 0.5, "ema": 0.4, "student": 0.3}

    def denoiser(self, name: str | None) -> Any:
        return lambda x, t, cond: self.eps(name, x, cond)

    def eps(self, name: str | None, x: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return self.slopes[name] * x + 0.1 * cond.prompt_embeds[:, :1, :1, None]


def stage(name: str) -> StageConfig:
    values = OmegaConfigLoader(str(CONF), env="base", **{**CONFIG_LOADER_ARGS, "default_run_env": "base"})["parameters"]
    overrides = StageOverrides(**values[name]["stage"])
    return overrides.apply(TscdDefaults(**values["tscd"]))


def by_hand(name: str, x: float, t: int, s: int, c: float) -> float:
    """One DDIM step of a network from t to s, on numbers."""
    eps = Toy.slopes[name] * x + 0.1 * c  # type: ignore[index]
    return float(A[s]) * (x - float(S[t]) * eps) / float(A[t]) + float(S[s]) * eps


def guided(x: float, t: int, s: int, c: float, w: float) -> float:
    eps = 0.6 * x + 0.1 * (-1.0 + w * (c + 1.0))  # the unconditional conditioning is -1
    return float(A[s]) * (x - float(S[t]) * eps) / float(A[t]) + float(S[s]) * eps


def expected(config: StageConfig, x0: torch.Tensor, c: torch.Tensor, seed: int) -> float:
    """The loss, sample by sample; the draws are those of the step's generator, in its order."""
    generator = torch.Generator().manual_seed(seed)
    z = tscd.offset_noise(tuple(x0.shape), config.offset_noise, generator)
    step = DistillationStep(Toy(), config, SCHEDULE, "epsilon", torch.device("cpu"))  # type: ignore[arg-type]
    times = tscd.sample_timesteps(len(x0), step.grid, step.bounds, generator, starts=config.starts, ends=config.ends)
    w = config.guidance[0] + (config.guidance[1] - config.guidance[0]) * torch.rand(len(x0), generator=generator)
    grid = step.grid.tolist()
    total = 0.0
    for i in range(len(x0)):
        t, end = int(times.t_n[i]), int(times.t_end[i])
        noised = float(A[t]) * float(x0[i]) + float(S[t]) * float(z[i])
        x = float(z[i]) if t == 999 and config.pure_noise else noised

        def solver(x: float, t: int, s: int, i: int = i) -> float:
            return guided(x, t, s, float(c[i]), float(w[i])) if config.teacher == "base" else by_hand("previous", x, t, s, float(c[i]))

        below = grid[grid.index(t) - 1]
        target = solver(x, t, below)
        if config.target == "solver":
            while below > end:
                lower = grid[grid.index(below) - 1]
                target, below = solver(target, below, lower), lower
        elif below != int(times.t_b[i]):
            target = by_hand(config.target, target, below, end, float(c[i]))
        difference = by_hand("student", x, t, end, float(c[i])) - target
        total += difference**2 if config.distance == "mse" else (difference**2 + 1e-6) ** 0.5 - 1e-3
    return total / len(x0)


NAMES = ["lcm", "tcd", "pcm", *(f"progressive_k{k}" for k in (8, 4, 2, 1))]


@pytest.mark.parametrize("name", NAMES)
def test_loss_by_hand(name):
    config = stage(f"baseline_{name}").model_copy(
        update={"adversarial": stage("baseline_lcm").adversarial}
    )  # PCM's other half: test_adversary.py
    x0 = torch.linspace(-1, 1, 16).view(16, 1, 1, 1)
    c = torch.linspace(0.2, 1, 16)
    cond, uncond = Conditioning(c.view(16, 1, 1)), Conditioning(torch.full((16, 1, 1), -1.0))
    step = DistillationStep(Toy(), config, SCHEDULE, "epsilon", torch.device("cpu"))  # type: ignore[arg-type]
    loss, _ = step(x0, cond, uncond if config.teacher == "base" else None, torch.Generator().manual_seed(5))
    assert loss.item() == pytest.approx(expected(config, x0, c, 5), rel=1e-4)


def test_what_makes_each_baseline():
    lcm, tcd, pcm = (stage(f"baseline_{name}") for name in ("lcm", "tcd", "pcm"))
    assert (lcm.segments, lcm.ends, lcm.target, lcm.distance, lcm.sampling_eta) == (1, "segment_start", "student", "huber", 1.0)
    assert (tcd.segments, tcd.ends, tcd.target, tcd.distance, tcd.offset_noise) == (1, "uniform", "ema", "mse", 0.0)
    assert (pcm.segments, pcm.ends, pcm.adversarial.renoise, pcm.adversarial.pair) == (4, "segment_start", True, False)
    assert pcm.adversarial.weight > 0 == lcm.adversarial.weight == tcd.adversarial.weight


def test_the_weight_moves_to_the_adversarial_term_as_k_falls():
    stages = [stage(f"tscd_k{k}") for k in (8, 4, 2, 1)]
    shares = [s.adversarial.weight / (s.mse_weight + s.adversarial.weight) for s in stages]
    assert shares[0] == shares[1] == 0 < shares[2] < shares[3] < 0.5 and all(s.adversarial.balance for s in stages)


def test_progressive_takes_the_whole_way_of_its_teacher():
    """From a segment's end to its start: five guided steps of the grid with 40 points, then two of the stage before."""
    for k, points, calls in ((8, 40, 5), (4, 8, 2), (2, 4, 2), (1, 2, 2)):
        config = stage(f"baseline_progressive_k{k}")
        assert (config.segments, config.solver_points, config.starts) == (k, points, "segment_ends")
        toy, seen = Toy(), []
        inner = toy.eps
        toy.eps = lambda name, x, cond, inner=inner, seen=seen: (seen.append(name), inner(name, x, cond))[1]  # type: ignore[method-assign]
        step = DistillationStep(toy, config, SCHEDULE, "epsilon", torch.device("cpu"))  # type: ignore[arg-type]
        cond = Conditioning(torch.zeros(8, 1, 1))
        step(torch.zeros(8, 1, 1, 1), cond, cond, torch.Generator().manual_seed(0))
        assert seen == [None if k == 8 else "previous"] * calls + ["student"]
