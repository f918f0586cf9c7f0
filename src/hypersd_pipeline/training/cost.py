"""What a step costs, in forward passes of the network at the training batch ("F"), measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.terms import AdversarialConfig, Cost, RegressionConfig


@torch.no_grad()
def measure_forward(
    adapters: AdaptedBackbone, x: Tensor, cond: Conditioning, autocast: Callable[[], AbstractContextManager[object]], repeats: int = 3
) -> dict[str, float]:
    """Median seconds of one forward pass of the base network on ``x``, and the share of it that the encoder takes.

    Returns:
        ``unet_forward_seconds`` and ``encoder_share``.
    """
    t = torch.full((len(x),), 500, device=x.device)

    def median(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(repeats + 1):
            _wait(x.device)
            began = time.perf_counter()
            with autocast():
                call()
            _wait(x.device)
            seconds.append(time.perf_counter() - began)
        return sorted(seconds[1:])[repeats // 2]

    adapters.use(None)
    whole = median(lambda: adapters.backbone(x, t, cond))
    return {"unet_forward_seconds": whole, "encoder_share": median(lambda: adapters.backbone.features(x, t, cond)) / whole}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ideal_forwards(config: StageConfig, encoder_share: float, *, full: bool = False) -> float:
    """Forward equivalents of one pass of a stage without any overhead: the student's, and what each term adds.

    Args:
        encoder_share: of a forward pass that the encoder takes. full: all weights of the student are trained.
    """
    passes = config.loop.accumulate
    again = 1.0 if config.gradient_checkpointing else 0.0
    cost = Cost(config.loop.batch_size // passes, passes, encoder_share, again, full)
    terms = config.active().values()
    places = [config.place_of(term) for term in terms]
    total = cost.student + _walked(config) if "sample" in places else 0.0
    for term, place in zip(terms, places, strict=True):
        if isinstance(term, AdversarialConfig):
            consistency = config.consistency if place == "trajectory" else None
            free = consistency is not None and consistency.teacher == "base"
            samples = cost.batch if consistency is None else consistency.batch or cost.batch
            total += encoder_share * term.encoder_passes(cost, features_are_free=free) * samples / cost.batch
        else:
            total += term.forwards(cost)
    return total


def _walked(config: StageConfig) -> float:
    """Forward passes without gradient before the step with gradient, in the mean."""
    sample = config.sample
    return sample.steps - 1 - (min(sample.gradient_steps, sample.steps) - 1) / 2


def prepared_forwards(config: StageConfig, batch: int) -> float:
    """Forward passes, on ``batch`` images, of what is made before the training: the pairs of a regression."""
    regression = config.one(RegressionConfig)
    if regression is None:
        return 0.0
    pairs = regression.pairs
    return pairs.count / batch * pairs.steps * (2 if pairs.source == "teacher" else 1)


def with_cost(report: Mapping[str, float], config: StageConfig, *, full: bool = False) -> dict[str, float]:
    """The report with ``step_forwards`` (measured), ``ideal_forwards`` and ``step_over_ideal`` added, where the stage has trained steps."""
    if "mean_step_seconds" not in report:
        return dict(report)
    ideal = ideal_forwards(config, report["encoder_share"], full=full)
    forwards = report["mean_step_seconds"] / (report["unet_forward_seconds"] * config.loop.accumulate)
    return {**report, "step_forwards": forwards, "ideal_forwards": ideal, "step_over_ideal": forwards / ideal}
