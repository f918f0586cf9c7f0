"""Each baseline's loss, with the settings of conf/base, against a value written out by hand on a toy network."""

import pytest
import stages
import torch

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.objectives import consistency
from hypersd_pipeline.training.config import StageConfig, changed
from hypersd_pipeline.training.rollouts import Trajectory
from hypersd_pipeline.training.stage import build_stage
from hypersd_pipeline.training.terms import ConsistencyConfig

PROCESS = stages.process()
A, S = PROCESS.alphas, PROCESS.sigmas
SLOPES = {"base": 0.6, "previous": 0.5, "ema": 0.4, "student": 0.3}


def toy(seen: list[str] | None = None) -> stages.Networks:
    """Networks ``eps = a x + 0.1 c``, one ``a`` each; c is the conditioning's first number."""

    def eps(name):
        def call(x, t, cond):
            if seen is not None:
                seen.append(name)
            return SLOPES[name] * x + 0.1 * cond.prompt_embeds[:, :1, :1, None]

        return call

    return stages.Networks(PROCESS, **{name: eps(name) for name in SLOPES})


def stage(name: str) -> StageConfig:
    return StageConfig(**stages.parameters()[name]["stage"])


def toy_rows(x0: torch.Tensor, c: torch.Tensor) -> stages.Rows:
    return stages.Rows(x0, Conditioning(c.view(-1, 1, 1)), Conditioning(torch.full((1, 1, 1), -1.0)))


def by_hand(name: str, x: float, t: int, s: int, c: float) -> float:
    """One DDIM step of a network from t to s, on numbers."""
    eps = SLOPES[name] * x + 0.1 * c
    return float(A[s]) * (x - float(S[t]) * eps) / float(A[t]) + float(S[s]) * eps


def guided(x: float, t: int, s: int, c: float, w: float) -> float:
    eps = 0.6 * x + 0.1 * (-1.0 + w * (c + 1.0))  # the unconditional conditioning is -1
    return float(A[s]) * (x - float(S[t]) * eps) / float(A[t]) + float(S[s]) * eps


def expected(config: ConsistencyConfig, data: stages.Rows, batch: int, seed: int) -> float:
    """The loss, sample by sample. The draws are those of the stage's generator, in its order."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(data), (batch,), generator=generator)
    x0, c = data.latents[picks], data.cond.prompt_embeds[picks].flatten()
    z = consistency.offset_noise(tuple(x0.shape), config.offset_noise, generator)
    grid, bounds = PROCESS.solver_grid(config.solver_points), PROCESS.boundaries(config.segments)
    times = consistency.sample_timesteps(batch, grid, bounds, generator, starts=config.starts, ends=config.ends)
    w = config.guidance[0] + (config.guidance[1] - config.guidance[0]) * torch.rand(batch, generator=generator)
    points = grid.tolist()
    total = 0.0
    for i in range(batch):
        t, end = int(times.t_n[i]), int(times.t_end[i])
        noised = float(A[t]) * float(x0[i]) + float(S[t]) * float(z[i])
        x = float(z[i]) if t == 999 and config.pure_noise else noised

        def solver(x: float, t: int, s: int, i: int = i) -> float:
            return guided(x, t, s, float(c[i]), float(w[i])) if config.teacher == "base" else by_hand("previous", x, t, s, float(c[i]))

        below = points[points.index(t) - 1]
        target = solver(x, t, below)
        if config.target == "solver":
            while below > end:
                lower = points[points.index(below) - 1]
                target, below = solver(target, below, lower), lower
        elif below != int(times.t_b[i]):
            target = by_hand(config.target, target, below, end, float(c[i]))
        difference = by_hand("student", x, t, end, float(c[i])) - target
        total += difference**2 if config.distance == "mse" else (difference**2 + 1e-6) ** 0.5 - 1e-3
    return total / batch


NAMES = ["lcm", "tcd", "pcm", *(f"progressive_k{k}" for k in (8, 4, 2, 1))]


@pytest.mark.parametrize("name", NAMES)
def test_loss_by_hand(name):
    config = changed(stage(f"baseline_{name}"), terms={"adversarial": None})  # PCM's other half: terms/test_adversarial.py
    data = toy_rows(torch.linspace(-1, 1, 16).view(16, 1, 1, 1), torch.linspace(0.2, 1, 16))
    loss, scalars = build_stage(config, stages.context(toy(), data, batch=16))(torch.Generator().manual_seed(5))
    assert loss.item() == pytest.approx(expected(config.consistency, data, 16, 5), rel=1e-4)
    assert set(scalars) == {"distance"} and scalars["distance"].item() == pytest.approx(loss.item())


def test_what_makes_each_baseline():
    configs = [stage(f"baseline_{name}") for name in ("lcm", "tcd", "pcm")]
    lcm, tcd, pcm = (config.consistency for config in configs)
    assert (lcm.segments, lcm.ends, lcm.target, lcm.distance, configs[0].sampling.eta) == (1, "segment_start", "student", "huber", 1.0)
    assert (tcd.segments, tcd.ends, tcd.target, tcd.distance, tcd.offset_noise) == (1, "uniform", "ema", "mse", 0.0)
    judge = configs[2].adversarial
    assert (pcm.segments, pcm.ends, judge.renoise, judge.pair) == (4, "segment_start", True, False)
    assert judge.weight > 0 and configs[0].adversarial is None and configs[1].adversarial is None


def test_the_weight_moves_to_the_adversarial_term_as_k_falls():
    configs = [stage(f"tscd_k{k}") for k in (8, 4, 2, 1)]
    weights = [0.0 if c.adversarial is None else c.adversarial.weight for c in configs]
    shares = [weight / (c.consistency.weight + weight) for c, weight in zip(configs, weights, strict=True)]
    assert shares[0] == shares[1] == 0 < shares[2] < shares[3] < 0.5 and all(c.terms["adversarial"].balance for c in configs)


def test_progressive_takes_the_whole_way_of_its_teacher():
    """From a segment's end to its start: five guided steps of the grid with 40 points, then two of the stage before."""
    for k, points, calls in ((8, 40, 5), (4, 8, 2), (2, 4, 2), (1, 2, 2)):
        config = stage(f"baseline_progressive_k{k}")
        term, seen = config.consistency, []
        assert (term.segments, term.solver_points, term.starts) == (k, points, "segment_ends")
        context = stages.context(toy(seen), toy_rows(torch.zeros(8, 1, 1, 1), torch.zeros(8)), batch=8)
        build_stage(config, context)(torch.Generator().manual_seed(0))
        assert seen == ["base" if k == 8 else "previous"] * calls + ["student"]


def test_a_stage_whose_grid_misses_a_boundary_is_refused():
    config = changed(stage("tscd_k8"), terms={"consistency": {"solver_points": 50}}).consistency
    with pytest.raises(UserError, match="use solver_points: 40"):
        Trajectory(config, stages.context(toy(), toy_rows(torch.zeros(8, 1, 1, 1), torch.zeros(8))))
