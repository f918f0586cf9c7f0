"""A model sampled one way and scored: one image of each prompt, and several of some of them. Each process does its share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.evaluation.sampling import batches, sample
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.diversity import pairwise_distance
from hypersd_pipeline.metrics.grids import to_pil
from hypersd_pipeline.metrics.scorer import Scorer, Scores
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.teacher import Teacher
from hypersd_pipeline.training import distributed


@dataclass(frozen=True)
class Way:
    """How a model is sampled: its contract at a number of steps, and a guidance scale."""

    contract: Contract
    steps: int
    guidance_scale: float = 1.0

    def denoiser(self, teacher: Teacher, config: EvaluationConfig) -> Denoiser:
        """The teacher's network as it is now, in the precision in which the evaluation samples, with guidance where there is some."""
        denoiser = teacher.denoiser().in_bf16(config.mixed_precision == "bf16")
        return denoiser if self.guidance_scale == 1 else denoiser.guided(teacher.unconditional(1), self.guidance_scale)

    def timesteps(self, teacher: Teacher) -> Tensor:
        """int64, falling."""
        return self.contract.timesteps(self.steps, teacher.process.num_train_timesteps)

    def options(self) -> dict[str, Any]:
        """See `sample`."""
        return {"eta": self.contract.eta, "to_clean": self.contract.only_timestep is not None}


Look = Callable[[Sequence[str], Tensor, Scores], None]
"""What else is done with a batch: its prompts, its images ``[b, 3, h, w]`` in [0, 1] and their scores."""


def score_samples(
    teacher: Teacher,
    scorer: Scorer,
    config: EvaluationConfig,
    prompts: Sequence[str],
    cond: Conditioning,
    way: Way,
    look: Look = lambda *batch: None,
) -> tuple[Scores, list[Image.Image]]:
    """Sample one image per prompt and score it. Each process does so for its batches, and has the scores of all afterwards.

    Args:
        look: called with each batch of this process, so that nobody has to sample the same images again.

    Returns:
        The scores in the order of the prompts, and the images of the first ``grid_prompts`` prompts.
    """
    denoiser, parts = way.denoiser(teacher, config), []
    for indices in distributed.mine(batches(len(prompts), config.batch_size)):
        images = sample(teacher, cond, indices, way.timesteps(teacher), seed=config.seed, denoiser=denoiser, **way.options())
        shown = [to_pil(image) for image in images[: max(0, config.grid_prompts - indices.start)]]
        part = prompts[indices.start : indices.stop]
        scores = scorer.score(images, part)
        look(part, images, scores)
        parts.append((scores, shown))
    collected = distributed.gathered(parts)
    return Scores.cat([scores for scores, _ in collected]), [image for _, shown in collected for image in shown]


def diversity(teacher: Teacher, scorer: Scorer, config: EvaluationConfig, first: Tensor, cond: Conditioning, way: Way) -> Tensor:
    """How much the images of a prompt differ from seed to seed (`pairwise_distance`), for the first ``diversity.prompts`` prompts.

    Args:
        first: features ``[n, d]`` of each prompt's image with the noise that all rows share, which is one of its images.

    Returns:
        ``[prompts]``.
    """
    n, denoiser = min(config.diversity.prompts, len(cond)), way.denoiser(teacher, config)
    wanted = [(variant, indices) for variant in range(1, config.diversity.seeds) for indices in batches(n, config.batch_size)]
    parts = []
    for variant, indices in distributed.mine(wanted):
        options = {**way.options(), "variant": variant}
        images = sample(teacher, cond, indices, way.timesteps(teacher), seed=config.seed, denoiser=denoiser, **options)
        with torch.inference_mode():
            parts.append(scorer.features(images.to(scorer.device, torch.float32)).float().cpu())
    others = torch.cat(distributed.gathered(parts)).view(config.diversity.seeds - 1, n, -1)
    return pairwise_distance(torch.cat([first[None, :n], others]).transpose(0, 1))
