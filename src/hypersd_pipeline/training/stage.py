"""A stage: weighted terms on what the student predicts. The graph is cut at the prediction once, here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hypersd_pipeline.draws import Draws, apart
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.objectives.adversarial import balanced
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.config import StageConfig
from hypersd_pipeline.training.critic import CRITIC
from hypersd_pipeline.training.loop import Stateful
from hypersd_pipeline.training.rollouts import NoisedImages, Rollout, Samples, Trajectory
from hypersd_pipeline.training.terms import (
    AnchorConfig,
    Context,
    MatchingConfig,
    PerceptualConfig,
    Prediction,
    RegressionConfig,
    RewardTermConfig,
    Scalars,
    Term,
    View,
)
from hypersd_pipeline.training.terms.adversarial import ADAPTER, Adversary
from hypersd_pipeline.training.terms.base import Place
from hypersd_pipeline.training.terms.matching import Matching
from hypersd_pipeline.training.terms.perceptual import Perceptual
from hypersd_pipeline.training.terms.reward import RewardTerm

Weighted = tuple[float, Term]

OF_IMAGES = (RewardTerm, Perceptual)
"""Terms whose gradient comes back through the decoder."""


@dataclass
class Stage:
    """The loss of one pass, as the loop calls it.

    Each term is judged at a copy of the prediction that is cut from the student's graph. So terms can be weighed by the size of their
    gradients, their own graphs are freed before the student's is walked, once, and gradient checkpointing recomputes each part with the
    adapter that it was computed with.

    Attributes:
        parts: rollouts, each with the terms that judge its prediction.
        decode: clean latents to images, for terms that ask for them.
        ready: called before a pass ends: what makes the student's network compute as it did, for gradient checkpointing.
        observed: whether the scalars hold the norm of each term's gradient at the prediction, with its weight: ``gradient_<term>``. Terms
            that see images have one norm together, ``gradient_images``, which costs no further way back through the decoder.
    """

    parts: Sequence[tuple[Rollout, Sequence[Weighted]]]
    decode: Callable[[Tensor], Tensor] | None = None
    ready: Callable[[], None] = field(default=lambda: None)
    observed: bool = False
    _worker: ThreadPoolExecutor | None = field(default=None, init=False, repr=False)
    _ahead: tuple[Draws, Future[list[Any]]] | None = field(default=None, init=False, repr=False)
    _misses: int = field(default=0, init=False, repr=False)

    @contextmanager
    def drawing_ahead(self, device: torch.device) -> Iterator[None]:
        """Inside, the next pass's batches are read and drawn by a thread while a pass is computed. One pass ahead, and no further.

        The stage's generator stays where it would be, so that a checkpoint knows nothing of it. A batch that was drawn ahead is used only
        where the generator would have drawn the same (`Draws.catch_up`). That fails where terms draw too and an update has one pass, and
        after two such failures in a row nothing is drawn ahead any more. What goes wrong in the thread is raised by the pass that needs the
        batch.
        """
        ready = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        with ThreadPoolExecutor(1, "draws", initializer=ready) as self._worker:
            try:
                yield
            finally:
                self._worker = self._ahead = None

    def observe(self, observed: bool) -> None:
        """Whether the next passes measure the norms of the terms' gradients. They change nothing else."""
        self.observed = observed

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """The loss, whose gradient reaches the student only, and detached scalars to log."""
        self._warm_up(generator)
        batches = self._batches(generator)
        losses: list[Tensor] = []
        scalars: Scalars = {}
        for (rollout, terms), batch in zip(self.parts, batches, strict=True):
            prediction = rollout.predict(batch, generator)
            view = View(prediction, prediction.sample.detach().requires_grad_(), self.decode)
            value, gradient = self._judged(view, terms, generator, scalars)
            losses.append(carried(prediction.sample, gradient, value))
        self.ready()
        return torch.stack(losses).sum(), scalars

    def _draw(self, generator: torch.Generator) -> list[Any]:
        return [rollout.draw(generator) for rollout, _ in self.parts]

    def _batches(self, generator: torch.Generator) -> list[Any]:
        """This pass's batches. Then the next pass's are drawn in the background, where that is wanted."""
        if self._worker is None or not isinstance(generator, Draws):
            return self._draw(generator)
        batches: list[Any] | None = None
        if self._ahead is not None:
            other, future = self._ahead
            drawn = future.result()
            batches = drawn if generator.catch_up(other) else None
            self._ahead, self._misses = None, 0 if batches is not None else self._misses + 1
        batches = self._draw(generator) if batches is None else batches
        if self._misses < 2:
            other = generator.following()
            self._ahead = (other, self._worker.submit(self._draw, other))
        return batches

    def _warm_up(self, generator: torch.Generator) -> None:
        """Train opponents that are not warm yet on predictions of the student as it is. Their counts are in the checkpoint."""
        for rollout, terms in self.parts:
            for term in (term for _, term in terms):
                if isinstance(term, Matching):
                    while term.critic.cold:
                        with apart(generator):
                            prediction = _without_graph(rollout, generator)
                            some = slice(0, term.config.batch)
                            term.critic.warm_up(prediction.sample[some], prediction.cond[some], generator)
                elif isinstance(term, Adversary):
                    while term.cold:
                        with apart(generator):
                            term.warm_up(_without_graph(rollout, generator), generator)

    def _judged(self, view: View, terms: Sequence[Weighted], generator: torch.Generator, scalars: Scalars) -> tuple[Tensor, Tensor]:
        """The terms' weighted sum and its gradient at the prediction; a discriminator's is weighed against that of all others."""
        leaf = view.sample
        value, weighed = torch.zeros((), device=leaf.device), False
        known: dict[str, Tensor] = {}
        for weight, term in terms:
            if not isinstance(term, Adversary):
                loss, more = term(view, generator)
                value, weighed = value + weight * loss, True
                scalars.update(more)
                if self.observed and not isinstance(term, OF_IMAGES):
                    known[type(term).__name__.lower()] = torch.autograd.grad(weight * loss, leaf, retain_graph=True)[0]
        gradient = torch.autograd.grad(value, leaf)[0] if weighed else torch.zeros_like(leaf)
        if any(isinstance(term, OF_IMAGES) for _, term in terms) and self.observed:
            known["images"] = gradient - sum(known.values())
        for weight, term in terms:
            if isinstance(term, Adversary):
                loss, more = term(view, generator)
                (toward,) = torch.autograd.grad(loss, leaf)
                share = (
                    weight
                    * term.heard
                    * (balanced(toward, gradient, distributed.norm, cap=term.config.balance_cap) if term.config.balance else toward)
                )
                gradient = gradient + share
                known["adversarial"] = share
                value = value + weight * loss
                scalars.update(more)
        if self.observed:
            scalars.update({f"gradient_{name}": part.norm() for name, part in known.items()})
        return value.detach(), gradient

    @property
    def adversary(self) -> Adversary | None:
        """The discriminator, if the stage has one."""
        return next((term for _, terms in self.parts for _, term in terms if isinstance(term, Adversary)), None)

    def state(self) -> dict[str, Stateful]:
        """What a checkpoint must hold of the terms' opponents, and of a rollout that counts its passes."""
        critic = next((term.critic for _, terms in self.parts for _, term in terms if isinstance(term, Matching)), None)
        warmed = next((rollout for rollout, _ in self.parts if isinstance(rollout, Trajectory) and rollout.config.tangent_warmup), None)
        opponents: dict[str, Stateful | None] = {"critic": critic, "discriminator": self.adversary, "trajectory": warmed}
        return {name: part for name, part in opponents.items() if part is not None}

    def companions(self) -> dict[str, torch.optim.Optimizer]:
        """Optimisers that step with the student's."""
        return {} if self.adversary is None else {"discriminator": self.adversary.optimizer}

    def watch(self, values: Mapping[str, float], step: int) -> None:
        """Alarms of the opponents."""
        if self.adversary is not None:
            self.adversary.watch(values, step)
        for term in (term for _, terms in self.parts for _, term in terms if isinstance(term, Matching)):
            term.watch(values, step)


@torch.no_grad()
def _without_graph(rollout: Rollout, generator: torch.Generator) -> Prediction:
    return rollout.predict(rollout.draw(generator), generator)


def carried(output: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """A scalar with the value ``value`` whose gradient at ``output`` is ``gradient``."""
    product = (output * gradient).sum()
    return product + (value - product).detach()


def build_stage(config: StageConfig, context: Context, ready: Callable[[], None] = lambda: None) -> Stage:
    """The stage that a configuration describes.

    Raises:
        UserError: weights of a judge are missing, the solver's grid misses a segment boundary, or a term needs what the context lacks.
    """
    _check_needs(config, context)
    terms: dict[Place, list[Weighted]] = {"trajectory": [], "sample": [], "noised_image": []}
    for term in config.active().values():
        terms[config.place_of(term)].append((term.weight, term.build(context)))
    return Stage([(_rollout(place, config, context), found) for place, found in terms.items() if found], context.decode, ready)


def _check_needs(config: StageConfig, context: Context) -> None:
    """Raises UserError for a term that needs stored pairs, a segmenter or an adapter that this training does not have."""
    names, consistency, judge = context.adapters.names, config.consistency, config.adversarial
    averaged = {"ema"} if consistency is None or consistency.teacher == "base" else {"ema", "previous"}
    lacking = {
        "consistency": consistency is not None and not averaged <= set(names),
        "matching": config.one(MatchingConfig) is not None and CRITIC not in names,
        "regression": config.one(RegressionConfig) is not None and context.pairs is None,
        "perceptual": config.one(PerceptualConfig) is not None and (context.perceptual is None or context.annotated is None),
        "adversarial.encoder: adapter": judge is not None and judge.encoder == "adapter" and ADAPTER not in names,
    }
    for term in (term for term, lacks in lacking.items() if lacks):
        raise UserError(f"stage.terms.{term} does not fit this training, which lacks what the term needs; switch it off.")


def _rollout(place: Place, config: StageConfig, context: Context) -> Rollout:
    judge = config.adversarial
    if place == "trajectory":
        assert config.consistency is not None
        here = judge if judge is not None and config.place_of(judge) == place else None
        free = here is not None and here.pair and here.encoder == "frozen" and here.levels == 1
        return Trajectory(config.consistency, context, with_features=free, with_data=here is not None and here.real == "data")
    if place == "noised_image":
        perceptual = config.one(PerceptualConfig)
        assert perceptual is not None
        return NoisedImages(perceptual, config.sample, context)
    return Samples(
        config.sample,
        context,
        unconditional=config.one(MatchingConfig) is not None,
        prompts=config.one(RewardTermConfig) is not None,
        real=judge is not None,
        anchor=config.one(AnchorConfig) is not None,
    )


def needs(config: StageConfig) -> dict[str, Any]:
    """Further adapters that a stage's terms need on the network: names that start anew, and names that sit in the encoder only."""
    judge = config.adversarial
    encoder = (ADAPTER,) if judge is not None and judge.encoder == "adapter" else ()
    fresh = (CRITIC,) if config.one(MatchingConfig) is not None else ()
    return {"fresh_names": fresh, "encoder_names": encoder, "trainable": (*fresh, *encoder)}
