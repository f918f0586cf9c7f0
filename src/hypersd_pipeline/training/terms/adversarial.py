"""The adversarial half of the hybrid distance (Hyper-SD section 3.1, after SDXL-Lightning, arXiv 2402.13929)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning, moved
from hypersd_pipeline.config import Count, Decay, Rate, Share
from hypersd_pipeline.draws import rand, randn
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.discriminator import make_head
from hypersd_pipeline.objectives.adversarial import Loss, discriminator_loss, generator_loss
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.loop import Steps, adamw
from hypersd_pipeline.training.terms.base import Context, Cost, Prediction, Scalars, TermConfig, View

log = logging.getLogger(__name__)

ADAPTER = "discriminator"
"""The adapter of a discriminator whose encoder is trained."""


class AdversarialConfig(TermConfig):
    """The discriminator of a stage.

    Attributes:
        balance: the term's gradient at the prediction is first brought to the norm of all other terms' together, so that the weight is a
            share and does not depend on the teacher's scale.
        encoder: ``frozen`` trains the head alone on the teacher's features. ``adapter`` trains the encoder too, through a LoRA of its own.
        pair: judge ``(x_t, x_s)``, or ``x_s`` alone.
        renoise: bring both sides to a shared, higher noise level before they are judged (PCM).
        hidden: channels of the head, a multiple of 32.
        real: what it takes for real on a trajectory: the consistency ``target``, or ``data`` that are noised to the same time. Samples are
            always judged against data.
        levels: of features. 1: the mid block's. More: those of so many earlier blocks of the encoder too, with a head each.
        norm: of the head: ``group`` normalisation, or ``none``.
        loss: see `objectives.adversarial.discriminator_loss`.
        balance_cap: largest factor by which ``balance`` may raise the gradient. None: any.
        listen_above: running accuracy from which on the student listens. At 1/2 the discriminator knows nothing. 0: always.
        warmup_updates: of the discriminator alone, on the student as it starts, before the student's first update.
        keep: whether its head goes on to the next stage, beside the LoRA, and comes from the stage before. Otherwise it starts anew.
        learning_rate, betas: of its AdamW.
        alarm_after: updates in a row that it may be right about everything before a warning.
    """

    kind: Literal["adversarial"] = "adversarial"
    balance: bool = True
    encoder: Literal["frozen", "adapter"] = "frozen"
    pair: bool = True
    renoise: bool = False
    hidden: int = Field(default=128, ge=32, le=2**16)
    real: Literal["target", "data"] = "target"
    levels: int = Field(default=1, ge=1, le=16)
    norm: Literal["group", "none"] = "group"
    loss: Loss = "softplus"
    balance_cap: float | None = Field(default=None, gt=0, le=1e12)
    listen_above: Share = 0.0
    warmup_updates: int = Field(default=0, ge=0, le=10**6)
    keep: bool = False
    learning_rate: Rate = 1e-3
    betas: tuple[Decay, Decay] = (0.0, 0.99)
    alarm_after: Count = 20

    later: ClassVar[frozenset[str]] = frozenset({"real", "levels", "norm", "loss", "balance_cap", "listen_above", "warmup_updates", "keep"})

    @model_validator(mode="after")
    def _kept(self) -> AdversarialConfig:
        if self.keep and self.encoder == "adapter":
            raise ValueError("keep: the head alone goes on to the next stage, and here the encoder is trained too; use encoder: frozen")
        return self

    @field_validator("hidden")
    @classmethod
    def _whole_groups(cls, hidden: int) -> int:
        if hidden % 32:
            raise ValueError(f"hidden is {hidden}, not a multiple of 32, the groups of its normalisation")
        return hidden

    def build(self, context: Context) -> Adversary:
        """See `TermConfig`."""
        return Adversary(
            context.adapters, self, latent_shape=context.latent_shape, segments=context.segments, passes=context.passes, seed=context.seed,
            device=context.device,
        )  # fmt: skip

    def encoder_passes(self, cost: Cost, *, features_are_free: bool) -> float:
        """Passes of the encoder: forward of target, prediction and ``x_t``, and back.

        ``x_t`` is left out where the judgement has no second point. It is left out too where the solver's step gives its features
        away, which the base model does while the encoder is frozen. One pass goes back to the prediction. One goes back to each input
        where the encoder is trained.
        """
        trained = self.encoder == "adapter"
        inputs = 3.0 if self.pair and (trained or self.levels > 1 or not features_are_free) else 2.0
        back = 1.0 + (inputs if trained else 0.0)
        return inputs + back * (1.0 + cost.again)


class Adversary:
    """A discriminator on the student's own frozen network, and its optimiser.

    On a trajectory "real" is the consistency target. On samples it is data. The encoder runs once per sample and side. Discriminator and
    student both take their gradients from that pass, the student with the discriminator as it was before the update.

    Args:
        adapters: the network. Needs an adapter ``discriminator`` for ``encoder: adapter``.
        latent_shape: ``(c, h, w)``, from which the head has its depth.
        segments: k. Bounds how far ``renoise`` goes.
        passes: of gradient accumulation in an update.
    """

    def __init__(
        self,
        adapters: AdaptedBackbone,
        config: AdversarialConfig,
        *,
        latent_shape: tuple[int, int, int],
        segments: int,
        passes: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.adapters, self.config, self.segments, self.passes = adapters, config, segments, passes
        shapes = adapters.backbone.feature_shapes(latent_shape, config.levels)
        self.head = make_head(shapes, config.hidden, 2 if config.pair else 1, seed, config.norm).to(device)
        self.adapter = ADAPTER if config.encoder == "adapter" else None
        self.parameters = [*self.head.parameters(), *(adapters.parameters(ADAPTER) if self.adapter else ())]
        self.optimizer = adamw(self.parameters, lr=config.learning_rate, betas=config.betas, weight_decay=0.0)
        self.streak = torch.zeros((), device=device)
        self.running = torch.full((), 0.5, device=device)  # accuracy, in the mean of about the last hundred passes
        self._correct: list[Tensor] = []  # of the passes of an update so far
        self.warmed = 0

    @property
    def cold(self) -> bool:
        """Whether the warm-up is not over."""
        return self.warmed < self.config.warmup_updates

    def warm_up(self, prediction: Prediction, generator: torch.Generator) -> None:
        """One update of the warm-up, on a prediction without a graph."""
        self(View(prediction, prediction.sample.detach().requires_grad_()), generator)
        self._correct.clear()
        distributed.average_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        Steps([self.optimizer]).take(torch.isfinite(norm))
        torch.clear_autocast_cache()  # type: ignore[no-untyped-call]
        self.warmed += 1

    def start_from(self, head: Mapping[str, Tensor]) -> bool:
        """Take the head of the stage before. False, and nothing is changed, where it is of another shape."""
        own = self.head.state_dict()
        fits = own.keys() == head.keys() and all(own[name].shape == tensor.shape for name, tensor in head.items())
        if fits:
            self.head.load_state_dict(dict(head))
        return fits

    @property
    def takes_teachers_features(self) -> bool:
        """Whether the features of ``x_t`` are the base model's own, which its solver step passes anyway."""
        return self.config.pair and self.adapter is None and self.config.levels == 1

    @property
    def heard(self) -> float | Tensor:
        """1 where the student listens, 0 where the discriminator knows too little."""
        return 1.0 if self.config.listen_above == 0 else (self.running > self.config.listen_above).float()

    def __call__(self, view: View, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """See `Term`. Leaves the discriminator's gradient in its parameters."""
        p = view.prediction
        assert p.real is not None
        loss, scalars = self.judge(p.x_t, p.t, view.sample, p.real.to(view.sample), p.s, p.cond, generator, p.features)
        return loss, {**scalars, "adversarial": loss.detach()}

    def judge(
        self,
        x_t: Tensor,
        t: Tensor,
        prediction: Tensor,
        target: Tensor,
        s: Tensor,
        cond: Conditioning,
        generator: torch.Generator,
        features: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Leave the discriminator's gradient in its parameters and return the student's loss, whose only leaf is ``prediction``.

        Args:
            x_t, t: what the student saw. prediction, target: ``[b, c, h, w]`` at the times ``s``. ``prediction`` is a leaf.
            features: the encoder's features of ``x_t``, where they are known already (`takes_teachers_features`).
        """
        if self.config.renoise:
            prediction, target, s = self._renoised(prediction, target, s, generator)
        with nullcontext() if self.adapter else torch.no_grad():
            seen = None if features is None else [features]
            if self.config.pair and seen is None:
                both = self._encode(torch.cat([target, x_t]), torch.cat([s, t]), Conditioning.cat(cond, cond))
                real_features, seen = ([level.chunk(2)[half] for level in both] for half in (0, 1))
            else:
                real_features = self._encode(target, s, cond)
        fake_features = self._encode(prediction, s, cond)
        real, fake = self._logits(real_features, seen), self._logits(fake_features, seen)
        kind = self.config.loss
        loss = discriminator_loss(real, fake, kind)
        (loss / self.passes).backward(inputs=self.parameters, retain_graph=True)
        if kind == "relativistic":
            correct = (real > fake).float().mean()
        else:
            correct = ((real > 0).float().mean() + (fake < 0).float().mean()).detach() / 2
        self._count(correct)
        known = distributed.mean(correct) if self.config.listen_above else correct  # so that all ranks listen, or none
        self.running = self.running.lerp(known, 0.01)
        scalars = {"loss": loss, "accuracy": correct, "logit_real": real.mean(), "logit_fake": fake.mean(), "unbeaten_steps": self.streak}
        scalars["running_accuracy"] = self.running
        return generator_loss(fake, real.detach(), kind), {f"discriminator_{name}": value.detach() for name, value in scalars.items()}

    def _count(self, correct: Tensor) -> None:
        """Updates in a row with nothing but right answers, on the device: to read it at each pass would make the CPU wait."""
        self._correct.append(correct)
        if len(self._correct) == self.passes:
            whole = torch.stack(self._correct).min()
            self.streak = torch.where(whole == 1, self.streak + 1, torch.zeros_like(self.streak))
            self._correct.clear()

    def watch(self, values: Mapping[str, float], step: int) -> None:
        """Warn of a discriminator that is always right: the student then learns nothing from it."""
        unbeaten = values.get("discriminator_unbeaten_steps", 0)
        if unbeaten >= self.config.alarm_after:
            log.warning(
                "Step %d: the discriminator has been right about everything for %d updates; lower adversarial.learning_rate or "
                "adversarial.weight, or use encoder: frozen.",
                step,
                unbeaten,
            )

    def _encode(self, x: Tensor, t: Tensor, cond: Conditioning) -> list[Tensor]:
        return self.adapters.feature_levels(self.adapter, x, t, cond, self.config.levels)

    def _logits(self, features: list[Tensor], seen: list[Tensor] | None) -> Tensor:
        return self.head(*(features if seen is None else [torch.cat(pair, dim=1) for pair in zip(features, seen, strict=True)]))

    def _renoised(self, prediction: Tensor, target: Tensor, s: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        process = self.adapters.process
        T = process.num_train_timesteps
        share = moved(rand((len(s),), generator), s.device)
        t_star = (s + (share * (T // self.segments)).long()).clamp(max=T - 1)
        z = moved(randn(prediction.shape, generator), prediction.device).to(prediction)
        return process.renoise(prediction, s, t_star, z), process.renoise(target, s, t_star, z), t_star

    def state_dict(self) -> dict[str, Any]:
        """The head, the alarm's count, the running accuracy and the updates of the warm-up.

        The encoder's adapter is in the adapters' state, the optimiser in the loop's.
        """
        state = {"head": self.head.state_dict(), "streak": self.streak, "running": self.running}
        return {**state, "warmed": self.warmed} if self.config.warmup_updates else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.head.load_state_dict(state_dict["head"])
        self.streak = state_dict["streak"].to(self.streak)
        self.running = state_dict.get("running", torch.full((), 0.5)).to(self.running)
        self._correct.clear()
        self.warmed = state_dict.get("warmed", 0)
