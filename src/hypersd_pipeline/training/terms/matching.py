"""Distribution matching (Hyper-SD section 3.3): the student's samples against teacher and critic."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning, moved
from hypersd_pipeline.config import Count, Guidance
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.draws import rand, randn
from hypersd_pipeline.objectives import distribution_matching as dmd
from hypersd_pipeline.training.critic import Critic, CriticConfig
from hypersd_pipeline.training.terms.base import Context, Cost, Scalars, TermConfig, View
from hypersd_pipeline.training.terms.consistency import check_scales

log = logging.getLogger(__name__)


class MatchingConfig(TermConfig):
    """What the student's distribution is matched to.

    Attributes:
        batch: samples of a pass that are matched, and that the critic learns from. None: all. Matching costs several times what the student
            does, regression nothing.
        guidance: range of the teacher's scale in the real score, drawn uniformly per sample.
        renoise: share of T between which the student's samples are noised again to be judged.
        guidance_renoise: the same for what guidance adds, which then has a noise level of its own, never above the student's timestep
            (Decoupled DMD). None: guidance and matching share theirs.
        critic: see `CriticConfig`.
    """

    kind: Literal["matching"] = "matching"
    batch: Count | None = None
    guidance: tuple[Guidance, Guidance]
    renoise: tuple[float, float] = (0.02, 0.98)
    guidance_renoise: tuple[float, float] | None = None
    critic: CriticConfig = CriticConfig()

    later: ClassVar[frozenset[str]] = frozenset({"guidance_renoise"})

    @field_validator("guidance")
    @classmethod
    def _scales(cls, guidance: tuple[float, float]) -> tuple[float, float]:
        check_scales(guidance)
        return guidance

    @field_validator("renoise", "guidance_renoise")
    @classmethod
    def _rising(cls, renoise: tuple[float, float] | None) -> tuple[float, float] | None:
        if renoise is not None and not 0 <= renoise[0] < renoise[1] < 1:
            raise ValueError(f"renoise must be a rising pair of shares of T between 0 and 1, not {list(renoise)}")
        return renoise

    def build(self, context: Context) -> Matching:
        """See `TermConfig`."""
        return Matching(self, context.base, Critic(context.adapters, self.critic, context.passes))

    def forwards(self, cost: Cost) -> float:
        """Real score 2, fake score 1, and 2 for each update of the critic (at least once a pass), on the samples that are matched.

        Guidance with a noise level of its own takes one real score more.
        """
        scores = (3.0 if self.guidance_renoise is None else 4.0) + (2.0 + cost.again) * max(1.0, self.critic.updates / cost.passes)
        return scores * min(self.batch or cost.batch, cost.batch) / cost.batch


class Matching:
    """The matching gradient, and the critic that is trained on the samples before it is asked."""

    def __init__(self, config: MatchingConfig, teacher: Denoiser, critic: Critic) -> None:
        self.config, self.teacher, self.critic = config, teacher, critic

    def __call__(self, view: View, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """See `Term`."""
        some, cond, uncond = slice(0, self.config.batch), view.prediction.cond, view.prediction.uncond
        assert uncond is not None
        learned = self.critic.update(view.sample[some], cond[some], generator)
        gradient = self.gradient(view.sample[some].detach(), cond[some], uncond[some], generator, view.prediction.t[some])
        loss = dmd.matching_loss(view.sample[some], gradient)
        silent = (gradient == 0).flatten(1).all(dim=1).float().mean()  # where a prediction was not finite
        scalars = {"critic": learned, "matching": gradient.square().mean().sqrt(), "matching_silent": silent}
        return loss, {**scalars, "critic_skipped": self.critic.steps.count(loss.device)}

    def watch(self, values: Mapping[str, float], step: int) -> None:
        """Warn where more than half of the samples have no gradient: their predictions were not finite. The critic warns by itself."""
        self.critic.read()
        if values.get("matching_silent", 0.0) > 0.5:
            log.warning(
                "Step %d: teacher or critic gave predictions that are not finite for %.0f %% of the samples, so that matching does not "
                "move the student there; lower matching.critic.learning_rate, or use teacher.dtype float32.",
                step,
                100 * values["matching_silent"],
            )

    @torch.no_grad()
    def gradient(self, samples: Tensor, cond: Conditioning, uncond: Conditioning, generator: torch.Generator, stood: Tensor) -> Tensor:
        """``(p_real - p_fake) / mean|p_real|`` at the student's clean samples ``[b, c, h, w]``. No graph.

        Args:
            stood: the timesteps of the step that made the samples, int64 ``[b]``.
        """
        process, (low, high) = self.teacher.process, self.config.guidance
        t = dmd.sample_renoise_timesteps(len(samples), process, generator, *self.config.renoise)
        z = randn(samples.shape, generator)
        scale = (low + (high - low) * rand((len(samples),), generator)).view(-1, 1, 1, 1)
        t, z, scale = (moved(drawn, samples.device) for drawn in (t, z, scale))
        x_t, scale = process.add_noise(samples, z.to(samples), t), scale.to(samples)
        if self.config.guidance_renoise is None:
            real, _ = self.teacher.guided(uncond, scale).predict(x_t, t, cond)
        else:
            real, _ = self.teacher.predict(x_t, t, cond)
        fake, _ = self.critic.denoiser.predict(x_t, t, cond)
        gradient = dmd.matching_gradient(samples, real, fake)
        if self.config.guidance_renoise is None:
            return gradient
        t = moved(dmd.sample_below(stood, process, generator, *self.config.guidance_renoise), samples.device)
        x_t = process.add_noise(samples, moved(randn(samples.shape, generator), samples.device).to(samples), t)
        both, _ = self.teacher.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), Conditioning.cat(uncond, cond))
        without, with_prompt = both.chunk(2)
        return gradient + dmd.guidance_gradient(samples, with_prompt, without, scale)
