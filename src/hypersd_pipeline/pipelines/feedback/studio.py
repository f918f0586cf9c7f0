"""Where pictures are drawn with a distilled model and judged: the same for training, for the guard and for the trade-off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.diffusion.grids import trailing_timesteps
from hypersd_pipeline.diffusion.sampling import Denoiser, sample_ddim
from hypersd_pipeline.metrics.diversity import pairwise_distance
from hypersd_pipeline.metrics.features import FeatureExtractor
from hypersd_pipeline.models.teacher import Teacher
from hypersd_pipeline.pipelines.evaluation.sampling import prompt_noise
from hypersd_pipeline.pipelines.feedback.config import FeedbackConfig
from hypersd_pipeline.rewards import Reward, load_reward
from hypersd_pipeline.training.guard import HELD_OUT, TRAINED


@dataclass
class Judges:
    """The rewards that are trained on, with their weights, and the one that is not."""

    trained: list[tuple[Reward, float]]
    held_out: Reward

    @classmethod
    def load(cls, config: FeedbackConfig, device: torch.device) -> Judges:
        """Raises UserError for missing weights, and for a held-out reward among those trained on."""
        trained = [(load_reward(term.reward, device), term.weight) for term in config.rewards]
        return cls(trained, load_reward(config.held_out, device, to_train_on=False))

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Means: ``reward_<name>`` of each, ``trained_reward`` (their weighted mean), ``held_out_reward``."""
        own = [(reward.name, weight, _mean(reward, images, prompts)) for reward, weight in self.trained]
        total = sum(weight for _, weight, _ in own) or 1.0
        named = {f"reward_{name}": value for name, _, value in own}
        trained = sum(weight * value for _, weight, value in own) / total
        return {**named, TRAINED: trained, HELD_OUT: _mean(self.held_out, images, prompts)}


def _mean(reward: Reward, images: Tensor, prompts: Sequence[str]) -> float:
    return float(reward.score(images, prompts).mean())


@dataclass
class Studio:
    """Draws the same prompts from the same noise, whatever the model, and says how good, how diverse and how far from the first they are.

    Args:
        variants: pictures of each of the first quarter of the prompts, for the diversity.
        batch_size: pictures that are drawn, and held, at a time.
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
    _first: Tensor | None = field(default=None, init=False)

    @torch.no_grad()
    def draw(self, denoiser: Denoiser, indices: range, variant: int = 0) -> Iterator[tuple[list[str], Tensor]]:
        """Batches of prompts and their pictures ``[b, 3, r, r]`` in [0, 1]; only one is held at a time."""
        shape = (self.model.latent_channels, self.model.latent_size, self.model.latent_size)
        grid = trailing_timesteps(self.steps, self.model.schedule.num_train_timesteps)
        for start in range(indices.start, indices.stop, self.batch_size):
            rows = range(start, min(start + self.batch_size, indices.stop))
            noise = prompt_noise(rows, shape, self.seed, draw=1000 * variant).to(self.model.device)
            part = slice(rows.start, rows.stop)
            cond = self.cond[part].to(self.model.device)
            latents = sample_ddim(denoiser, noise, cond, grid, self.model.schedule, self.model.prediction_type)
            yield self.prompts[part], self.model.decode(latents)

    @torch.no_grad()
    def look(self, denoiser: Denoiser, distilled: Denoiser | None = None) -> dict[str, float]:
        """Rewards, ``diversity`` and ``distance`` (cosine, between features) from the pictures of ``distilled`` or of the first look."""
        if self._first is None and distilled is not None:
            self._first = self._features(distilled, range(len(self.prompts)))
        sums: dict[str, float] = {}
        parts = []
        for prompts, images in self.draw(denoiser, range(len(self.prompts))):
            for name, value in self.judges.scores(images, prompts).items():
                sums[name] = sums.get(name, 0.0) + value * len(prompts)
            parts.append(self.features(images))
        own = torch.cat(parts)
        self._first = own if self._first is None else self._first
        distance = 1 - torch.nn.functional.cosine_similarity(own, self._first, dim=-1).mean()
        few = range(max(1, len(self.prompts) // 4))
        variants = [own[: len(few)], *(self._features(denoiser, few, v) for v in range(1, self.variants))]
        diversity = pairwise_distance(torch.stack(variants, dim=1)).mean()
        means = {name: total / len(self.prompts) for name, total in sums.items()}
        return {**means, "diversity": float(diversity), "distance": float(distance)}

    def _features(self, denoiser: Denoiser, indices: range, variant: int = 0) -> Tensor:
        return torch.cat([self.features(images) for _, images in self.draw(denoiser, indices, variant)])
