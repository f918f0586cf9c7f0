"""Training of the text-image reward and of the held-out reward on preference pairs (Hyper-SD eq. 9)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypersd_pipeline.config import Decay, Strict
from hypersd_pipeline.data.preferences import PairSet, read_preferences_cache
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import tensors_sha256
from hypersd_pipeline.models.dual_encoder import DualEncoder, load_dual_encoder
from hypersd_pipeline.objectives.ranking import ranking_loss
from hypersd_pipeline.rewards.text_image import FILE, Role, TextImageHead, TextImageHeadConfig, head_inputs, save_text_image
from hypersd_pipeline.training.checkpoints import CheckpointStore, Identity
from hypersd_pipeline.training.loop import LoopConfig, MetricSink, make_accelerator, train

FolderWriter = Callable[[Path], None]

FEW = 10
"""With fewer different winners in the test part, the training part's winners set the scale."""


class RewardTrainingConfig(Strict):
    """How one reward is trained (eq. 9).

    Attributes:
        head: its shape.
        feature_dropout: on the towers' features. They are computed once, so this is the only augmentation.
        loop: the optimisation. ``batch_size`` counts pairs.
    """

    head: TextImageHeadConfig = TextImageHeadConfig()
    feature_dropout: Decay = 0.4
    loop: LoopConfig


def train_text_image(
    pairs: Path, training: RewardTrainingConfig, checkpoints: CheckpointStore, metric_stream: MetricSink
) -> tuple[FolderWriter, dict[str, Any]]:
    """The text-image reward: see `train_reward`."""
    return train_reward(pairs, training, "trained", checkpoints, metric_stream)


def train_held_out(
    pairs: Path, training: RewardTrainingConfig, checkpoints: CheckpointStore, metric_stream: MetricSink
) -> tuple[FolderWriter, dict[str, Any]]:
    """The held-out reward, trained on other images, on which feedback is never trained: see `train_reward`."""
    return train_reward(pairs, training, "held_out", checkpoints, metric_stream)


def train_reward(
    pairs: Path, training: RewardTrainingConfig, role: Role, checkpoints: CheckpointStore, metric_stream: MetricSink
) -> tuple[FolderWriter, dict[str, Any]]:
    """Train one reward by eq. 9 on its part of the pairs.

    Its scores are standardised on the test part's winners, because head and dual encoder score what they were trained on too high.
    Ranks, and with them the accuracies, do not depend on it.

    Args:
        pairs: the folder of the pairs' cache (`make_preferences`).
        role: the part to train on.

    Returns:
        A writer of ``reward.safetensors``, and the report: `train`'s, and for each kind of pair ``accuracy/<kind>`` and ``pairs/<kind>``
        on the test part.

    Raises:
        UserError: the pairs are missing or were made with another encoder, or the head does not fit the encoder.
    """
    encoder = load_dual_encoder()
    encoder_key = tensors_sha256(encoder.trained_tensors())
    _check_head(training, encoder)
    accelerator = make_accelerator(training.loop)
    device = accelerator.device
    encoder.to(device)
    (data, key), (test, _) = (read_preferences_cache(pairs, part, encoder_key) for part in (role, "test"))
    torch.manual_seed(training.loop.seed)  # for the head's initialisation: every other draw is from the loop's generator
    head = TextImageHead(training.head)
    head.whiten_(data.image, data.text)
    head.to(device)
    report = train(
        f"reward {role}",
        parameters=head.parameters(),
        loss_fn=_Loss(head, encoder, data, training, device),
        config=training.loop,
        state={"head": head},
        key=Identity(
            {**training.model_dump(mode="json"), "loop": training.loop.identity(), "role": role, "pairs": key, "encoder": encoder_key}
        ),
        checkpoints=checkpoints,
        metrics=metric_stream,
        accelerator=accelerator,
    )
    head.eval().requires_grad_(False)
    _standardise_(head, encoder, test, data)
    report = {**report, **accuracies(head, encoder, test)}
    recipe = {"training": training.model_dump(mode="json"), "pairs": key, **report}
    return partial(_write, head=head, encoder=encoder, role=role, recipe=recipe), report


def _write(folder: Path, head: TextImageHead, encoder: DualEncoder, role: Role, recipe: dict[str, Any]) -> None:
    save_text_image(head, encoder, role, folder / FILE, recipe)


def _check_head(training: RewardTrainingConfig, encoder: DualEncoder) -> None:
    own, given = encoder.config.embed_dim, training.head.embed_dim
    if training.head.inputs == "embeddings" and given != own:
        raise UserError(f"training.head.embed_dim: is {given}, the dual encoder's embeddings have {own}; set it to {own}.")


class _Loss:
    """Eq. 9 on random pairs, with dropout on the towers' features. All draws come from the loop's generator."""

    def __init__(self, head: TextImageHead, encoder: DualEncoder, data: PairSet, training: RewardTrainingConfig, device: Any) -> None:
        self.head, self.encoder, self.data, self.p, self.device = head, encoder, data, training.feature_dropout, device
        self.size = training.loop.batch_size // training.loop.accumulate

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = self.data.pairs[torch.randint(len(self.data), (self.size,), generator=generator)]
        keep = [torch.rand(self.size, x.shape[1], generator=generator) >= self.p for x in (self.data.image, self.data.text)]
        win, lose = (self._reward(pairs[:, i], pairs[:, i + 1], keep) for i in (0, 2))
        return ranking_loss(win, lose), {"accuracy": (win > lose).float().mean().detach()}

    def _reward(self, image: Tensor, text: Tensor, keep: list[Tensor]) -> Tensor:
        """Rewards ``[b]`` of rows of images and texts.

        Both sides of a pair lose the same features, so that what differs between them comes from the pair.
        """
        features = [x[rows] * k / (1 - self.p) for x, rows, k in zip((self.data.image, self.data.text), (image, text), keep, strict=True)]
        return self.head(*head_inputs(self.encoder, self.head.config, *(f.to(self.device) for f in features)))


@torch.no_grad()
def _score(head: TextImageHead, encoder: DualEncoder, data: PairSet, rows: Tensor) -> Tensor:
    """Scores ``[n]`` on the CPU of ``rows``, int64 ``[n, 2]`` of image and text."""
    device = encoder.device
    image, text = data.image[rows[:, 0]].to(device), data.text[rows[:, 1]].to(device)
    return head(*head_inputs(encoder, head.config, image, text)).cpu()


def _winners(head: TextImageHead, encoder: DualEncoder, data: PairSet) -> Tensor:
    """Scores ``[n]`` of all different winners."""
    return _score(head, encoder, data, data.pairs[:, :2].unique(dim=0))


def _standardise_(head: TextImageHead, encoder: DualEncoder, test: PairSet, data: PairSet) -> None:
    """Mean 0 and deviation 1 on the test part's winners, or with fewer than `FEW` of them on the training part's."""
    winners = _winners(head, encoder, test)
    if len(winners) < FEW:
        winners = _winners(head, encoder, data)
    head.standardise_(float(winners.mean()), float(winners.std()))


def accuracies(head: TextImageHead, encoder: DualEncoder, test: PairSet) -> dict[str, float]:
    """``accuracy/<kind>``, the share of pairs whose winner scores higher, and ``pairs/<kind>``, their number, for each kind that occurs."""
    right = (_score(head, encoder, test, test.pairs[:, :2]) > _score(head, encoder, test, test.pairs[:, 2:])).float()
    found: dict[str, float] = {}
    for number, name in enumerate(test.kinds):
        chosen = right[test.kind == number]
        if len(chosen):
            found |= {f"accuracy/{name}": float(chosen.mean()), f"pairs/{name}": float(len(chosen))}
    return found
