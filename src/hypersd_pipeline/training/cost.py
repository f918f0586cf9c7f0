"""What a step costs, in forward passes of the UNet at the training batch ("F"), measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.models.adapters import AdaptedUNet
from hypersd_pipeline.models.discriminator import encode_to_mid
from hypersd_pipeline.training.distillation import StageConfig
from hypersd_pipeline.training.distribution import MatchingConfig
from hypersd_pipeline.training.loop import LoopConfig


@torch.no_grad()
def measure_forward(
    adapters: AdaptedUNet, x: Tensor, cond: Conditioning, autocast: Callable[[], AbstractContextManager[object]], repeats: int = 3
) -> dict[str, float]:
    """Median seconds of one forward pass of the base UNet on ``x``, and the share of it that the encoder and mid block take.

    Returns:
        ``unet_forward_seconds`` and ``encoder_share``.
    """
    t = torch.full((len(x),), 500, device=x.device)
    x, cond = x.to(adapters.dtype), cond.to(dtype=adapters.dtype)

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
    whole = median(lambda: adapters.unet(x, t, **cond.unet_kwargs(), return_dict=False))
    return {"unet_forward_seconds": whole, "encoder_share": median(lambda: encode_to_mid(adapters.unet, x, t, cond)) / whole}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ideal_forwards(config: StageConfig, encoder_share: float) -> float:
    """Forward equivalents of one update of a stage without any overhead.

    Teacher 2 (one batched call with both halves of the guidance) or 1 (``previous_stage``), target 1, student 2 (a backward pass through
    LoRAs costs about one forward). The adversarial term adds encoder passes: forward of target, prediction and ``x_t``, the last of which
    the base model's solver step gives away where the encoder is frozen; one back to the prediction; and one back for each of them where the
    encoder is trained. Gradient checkpointing adds one for whatever is recomputed.
    """
    solver = 2.0 if config.teacher == "base" else 1.0
    target = {"ema": 1.0, "student": 1.0, "solver": solver * _further_solver_steps(config)}[config.target]
    again = 1.0 if config.gradient_checkpointing else 0.0
    encoder = 0.0
    if config.adversarial.weight:
        trained = config.adversarial.encoder == "adapter"
        points = 3.0 if config.adversarial.pair and (trained or config.teacher != "base") else 2.0
        back = 1.0 + (points if trained else 0.0)
        encoder = points + back + again * back
    return solver + target + 2.0 + again + encoder * encoder_share


def _further_solver_steps(config: StageConfig) -> float:
    """Steps after the first that a batch takes until its last sample has arrived (progressive distillation)."""
    return config.solver_points / config.segments - 1


def matching_forwards(
    config: MatchingConfig, batch: int, encoder_share: float, *, adversarial: bool, full: bool, again: bool = False, passes: int = 1
) -> float:
    """Forward equivalents of one pass of a one-step stage without any overhead.

    Student 2 (3 where all its weights are trained); real score 2, fake score 1, critic 2 for each of its updates (at least once a pass), on
    the samples that are matched; the consistency loss 5 of its own, smaller batch; the adversary's encoder two forward and one back.
    Gradient checkpointing (``again``) adds one for whatever is recomputed. Decoding for rewards is not counted.

    Args:
        batch: samples a pass. passes: of an update.
    """
    more = 1.0 if again else 0.0
    student = (3.0 if full else 2.0) + more
    scores = 3.0 + (2.0 + more) * max(1.0, config.critic.updates / passes) if config.matching_weight else 0.0
    scores *= min(config.matching_batch or batch, batch) / batch
    kept = (5.0 + more) * config.consistency_batch / batch if config.consistency_weight and not full else 0.0
    return student + scores + kept + ((3.0 + more) * encoder_share if adversarial else 0.0)


def with_cost(report: Mapping[str, float], config: StageConfig) -> dict[str, float]:
    """The report with ``step_forwards`` (measured), ``ideal_forwards`` and ``step_over_ideal`` added, where the stage has trained steps."""
    return _costed(report, lambda share: ideal_forwards(config, share), config.loop.accumulate)


def with_matching_cost(
    report: Mapping[str, float], config: MatchingConfig, loop: LoopConfig, *, adversarial: bool, full: bool, again: bool
) -> dict[str, float]:
    """`with_cost` for a one-step stage."""
    batch = loop.batch_size // loop.accumulate
    return _costed(
        report,
        lambda share: matching_forwards(config, batch, share, adversarial=adversarial, full=full, again=again, passes=loop.accumulate),
        loop.accumulate,
    )


def _costed(report: Mapping[str, float], ideal_of: Callable[[float], float], accumulate: int) -> dict[str, float]:
    if "mean_step_seconds" not in report:
        return dict(report)
    ideal = ideal_of(report["encoder_share"])
    forwards = report["mean_step_seconds"] / (report["unet_forward_seconds"] * accumulate)
    return {**report, "step_forwards": forwards, "ideal_forwards": ideal, "step_over_ideal": forwards / ideal}
