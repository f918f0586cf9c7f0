"""What a term is: a loss at the student's prediction, with a configuration that builds it and says what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from hypersd_pipeline.conditioning import Conditioning
from hypersd_pipeline.config import Strict, Weight
from hypersd_pipeline.data.trajectories import NoisePairs
from hypersd_pipeline.diffusion.denoiser import Denoiser
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.perception.annotations import AnnotatedSplit
from hypersd_pipeline.perception.protocol import Instances, PerceptualModel
from hypersd_pipeline.rewards import Reward, RewardConfig

Place = Literal["trajectory", "sample", "noised_image"]
"""Which prediction of the student a term judges (see `training.rollouts`)."""

Scalars = dict[str, Tensor]


@dataclass(frozen=True)
class Prediction:
    """What the student made of a batch, with its graph, and what terms need to judge it.

    Attributes:
        sample: ``[b, c, h, w]`` at the timesteps ``s``, at least float32. s: int64 ``[b]``; 0 is the clean end.
        x_t, t: what the student saw.
        cond, uncond: of the batch. ``uncond`` only where the teacher or a term needs it. prompts: the same as text, for rewards.
        target: what the sample is compared with: the consistency target, or stored latents.
        real: what a discriminator takes for real.
        features: the encoder's features of ``x_t``, where a pass of the base network has given them away.
        anchor: what the model without feedback makes of the same ``x_t``.
        instances: of the images that were noised.
    """

    sample: Tensor
    s: Tensor
    x_t: Tensor
    t: Tensor
    cond: Conditioning
    uncond: Conditioning | None = None
    prompts: Sequence[str] = ()
    target: Tensor | None = None
    real: Tensor | None = None
    features: Tensor | None = None
    anchor: Tensor | None = None
    instances: Sequence[Instances] = ()


@dataclass
class View:
    """A prediction, cut from the student's graph: what terms see.

    Attributes:
        sample: the prediction's, as a leaf. decode: clean latents to images that are not clipped.
    """

    prediction: Prediction
    sample: Tensor
    decode: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def images(self) -> Tensor:
        """The sample as images ``[b, 3, r, r]``, meant to be in [0, 1] and not clipped. Decoded once for all terms."""
        if self.decode is None:
            raise ValueError("a term asks for images, but the stage was built without a decoder")
        return self.decode(self.sample)


class Term(Protocol):
    """A loss at the student's prediction. A term may have an opponent of its own, such as a critic, which it trains when it is called."""

    def __call__(self, view: View, generator: torch.Generator) -> tuple[Tensor, Scalars]:
        """The loss, a scalar whose only leaf is ``view.sample``, and detached scalars to log.

        Args:
            generator: on the CPU. Every random draw comes from it.
        """
        ...


class Rows(Protocol):
    """What rollouts draw from, on the CPU: a split of the latent cache, or anything else with the same methods.

    ``indices`` are int64 ``[b]``. ``generator`` draws where a row offers a choice. None takes the first, or the mean.
    """

    def __len__(self) -> int: ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(c, h, w)``."""
        ...

    def sample(self, indices: Tensor, generator: torch.Generator | None) -> Tensor:
        """Clean latents ``[b, c, h, w]``, float32."""
        ...

    def conditioning(self, indices: Tensor, generator: torch.Generator | None = None) -> Conditioning:
        """Of the rows' captions."""
        ...

    def captions(self, indices: Tensor, generator: torch.Generator | None = None) -> list[str]:
        """The captions that `conditioning` uses for the same state of ``generator``."""
        ...

    def unconditional(self, n: int, sizes: Tensor | None = None) -> Conditioning:
        """The unconditional half of guidance, ``n`` times, with the ``sizes`` of the conditional half."""
        ...


@dataclass(frozen=True)
class Context:
    """What terms and rollouts are built from.

    Attributes:
        adapters: on the frozen network. student: what is trained. base: the network with its adapters off.
        data: rows to train on. latent_shape: ``(c, h, w)``, with aspect-ratio buckets the one with the shortest side.
        batch: samples of a pass. passes: of gradient accumulation in an update. seed: of the stage.
        segments: k of the stage; 1 where the student is to reach the clean end from anywhere.
        decode: clean latents to images that are not clipped, where a term needs images.
        pairs: stored noise and targets, where a term needs them. annotated: images with masks, where a term needs them.
        perceptual: the segmenter, loaded before anything else, where a term needs it.
        rewards: what is loaded already, so that it is not in memory twice.
    """

    adapters: AdaptedBackbone
    student: Denoiser
    base: Denoiser
    data: Rows
    latent_shape: tuple[int, int, int]
    batch: int
    device: torch.device
    passes: int = 1
    seed: int = 0
    segments: int = 1
    decode: Callable[[Tensor], Tensor] | None = None
    pairs: NoisePairs | None = None
    annotated: AnnotatedSplit | None = None
    perceptual: PerceptualModel | None = None
    rewards: Sequence[tuple[RewardConfig, Reward]] = ()


@dataclass(frozen=True)
class Cost:
    """In what a term's cost is counted (see `training.cost`).

    Attributes:
        batch: samples of a pass. passes: of an update. encoder_share: of a forward pass that the encoder takes.
        again: forward passes that gradient checkpointing adds to a backward pass, 0 or 1.
        full: all weights of the student are trained, not a LoRA.
    """

    batch: int
    passes: int
    encoder_share: float
    again: float = 0.0
    full: bool = False

    @property
    def student(self) -> float:
        """Forward equivalents of the student's pass, both ways. A backward pass through LoRAs costs about one forward."""
        return (3.0 if self.full else 2.0) + self.again


class TermConfig(Strict, ABC):
    """A term of a stage.

    Attributes:
        kind: which term. weight: of its loss in the stage's; a term of weight 0 is not built.
        place: which prediction it judges.
        needs_images: it asks for decoded images.
    """

    weight: Weight = 1.0

    place: ClassVar[Place] = "sample"
    needs_images: ClassVar[bool] = False

    @abstractmethod
    def build(self, context: Context) -> Term:
        """The term. Raises UserError for weights that are missing."""

    def forwards(self, cost: Cost) -> float:
        """Forward equivalents of a pass that the term adds to the student's, on ``cost.batch`` samples. Decoding is not counted."""
        return 0.0

    def files(self) -> list[Path]:
        """The weights of the judges that the term asks, found, fetched and checked. Raises UserError."""
        return []

    def check(self) -> None:
        """Raises UserError for a judge whose files are damaged or of another network."""
