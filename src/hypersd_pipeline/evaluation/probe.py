"""A fixed set of prompts and noise on which a distilled model is sampled and scored: for the guard and for the trade-off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.diffusion.sampling import sample_ddim
from hypersd_pipeline.evaluation.sampling import batches, prompt_noise
from hypersd_pipeline.metrics.diversity import pairwise_distance
from hypersd_pipeline.metrics.features import FeatureExtractor
from hypersd_pipeline.models.teacher import Teacher
from hypersd_pipeline.rewards import Reward
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.guard import HELD_OUT, TRAINED


@dataclass
class Judges:
    """The rewards that are trained on, with their weights, and the one that is not."""

    trained: Sequence[tuple[Reward, float]]
    held_out: Reward

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Means: ``reward_<name>`` of each, ``trained_reward`` (their weighted mean), ``held_out_reward``."""
        return self.judged(images, prompts)[0]

    @torch.no_grad()
    def judged(self, images: Tensor, prompts: Sequence[str]) -> tuple[dict[str, float], Tensor]:
        """`scores`, and the held-out reward of each image ``[b]``."""
        found = [(reward.name, weight, _mean(reward, images, prompts)) for reward, weight in self.trained]
        total = sum(weight for _, weight, _ in found) or 1.0
        named = {f"reward_{name}": value for name, _, value in found}
        trained = sum(weight * value for _, weight, value in found) / total
        held_out = self.held_out.score(images, prompts)
        return {**named, TRAINED: trained, HELD_OUT: float(held_out.mean())}, held_out


def _mean(reward: Reward, images: Tensor, prompts: Sequence[str]) -> float:
    return float(reward.score(images, prompts).mean())


Judged = tuple[int, tuple[dict[str, float], Tensor], Tensor]
"""How many images a batch has, their rewards (`Judges.judged`) and their features ``[b, d]``."""


@dataclass
class Probe:
    """Samples the same prompts from the same noise, whatever the model, and measures how good, diverse and far from a reference they are.

    Args:
        held_out: the held-out reward of each prompt at the last measurement ``[n]`` (an attribute).
        variants: images of each of the first quarter of the prompts, for the diversity.
        batch_size: images that are sampled, and held, at a time.
    """

    model: Teacher
    judges: Judges
    features: FeatureExtractor
    prompts: list[str]
    cond: Conditioning
    steps: int
    seed: int
    variants: int
    batch_size: int
    held_out: Tensor = field(default_factory=lambda: torch.empty(0), init=False)
    _reference: Tensor | None = field(default=None, init=False)

    @torch.no_grad()
    def sample(self, denoiser: Denoiser, n: int, variant: int = 0) -> Iterator[tuple[list[str], Tensor]]:
        """The first ``n`` prompts in batches, with their images ``[b, 3, r, r]`` in [0, 1].

        Only one batch is held at a time. Each process makes its share of them.
        """
        grid = denoiser.process.trailing_timesteps(self.steps)
        for rows in distributed.mine(batches(n, self.batch_size)):
            noise = prompt_noise(rows, self.model.latent_shape, self.seed, draw=1000 * variant).to(self.model.device)
            part = slice(rows.start, rows.stop)
            latents = sample_ddim(denoiser, noise, self.cond[part].to(self.model.device), grid)
            yield self.prompts[part], self.model.decode(latents)

    def judge(self, prompts: Sequence[str], images: Tensor, features: Tensor) -> Judged:
        """A batch of the prompts' own images ``[b, 3, r, r]``, for `measure`, with their features ``[b, d]``."""
        return len(prompts), self.judges.judged(images, prompts), features.cpu()

    def samples_as(self, timesteps: Sequence[int], eta: float) -> bool:
        """Whether the same images come out of DDIM, or of TCDScheduler's steps for an ``eta`` above 0, on falling ``timesteps``."""
        return eta == 0 and list(timesteps) == self.model.process.trailing_timesteps(self.steps).tolist()

    @torch.no_grad()
    def measure(self, denoiser: Denoiser, distilled: Denoiser | None = None, judged: Sequence[Judged] | None = None) -> dict[str, float]:
        """Rewards, ``diversity`` and ``distance`` (cosine, between features) to the images of ``distilled`` or of the first measurement.

        Several processes measure together, and all of them have the same metrics.

        Args:
            judged: of this process's batches, where ``denoiser``'s images are there already (`judge`). None: they are sampled.
        """
        if self._reference is None and distilled is not None:
            self._reference = self._features(distilled, len(self.prompts))
        if judged is None:
            judged = [self.judge(prompts, images, self.features(images)) for prompts, images in self.sample(denoiser, len(self.prompts))]
        made = distributed.gathered(list(judged))
        sums: dict[str, float] = {}
        for n, (means, _), _ in made:
            for name, value in means.items():
                sums[name] = sums.get(name, 0.0) + value * n
        features = torch.cat([part for _, _, part in made])
        self.held_out = torch.cat([each.cpu() for _, (_, each), _ in made])
        self._reference = features if self._reference is None else self._reference
        distance = 1 - torch.nn.functional.cosine_similarity(features, self._reference, dim=-1).mean()
        few = max(1, len(self.prompts) // 4)
        variants = [features[:few], *(self._features(denoiser, few, v) for v in range(1, self.variants))]
        diversity = pairwise_distance(torch.stack(variants, dim=1)).mean()
        means = {name: total / len(self.prompts) for name, total in sums.items()}
        return {**means, "diversity": float(diversity), "distance": float(distance)}

    def _features(self, denoiser: Denoiser, n: int, variant: int = 0) -> Tensor:
        return torch.cat(distributed.gathered([self.features(images).cpu() for _, images in self.sample(denoiser, n, variant)]))
