"""Nodes of the reward models' training: pairs in, rewards and their accuracy out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.dual_encoder import DualEncoder, load_dual_encoder, tensors_hash
from hypersd_pipeline.pipelines.reward_models.config import PairsConfig, RewardTrainingConfig
from hypersd_pipeline.pipelines.reward_models.pairs import (
    COLUMNS,
    PairSet,
    pairs_from_manifest,
    pairs_from_preferences,
    read_pairs,
    read_preferences,
    write_pairs,
)
from hypersd_pipeline.pipelines.teacher.encoders import ranking_loss
from hypersd_pipeline.rewards.text_image import FILE, Role, TextImageHead, head_inputs, save_text_image
from hypersd_pipeline.training.checkpoints import CheckpointStore, fingerprint
from hypersd_pipeline.training.loop import MetricStream, make_accelerator, train

FolderWriter = Callable[[Path], None]

FEW = 10
"""Fewer different winners in the test part set no scale; the training part's do then."""


def make_pairs(manifest: Manifest, pairs: PairsConfig) -> tuple[FolderWriter, pd.DataFrame]:
    """A writer of the preference pairs' features, and the table of bad rows of a user's file (file, row, reason).

    Raises:
        UserError: too few rows, or a user's file without a good one.
    """
    encoder = load_dual_encoder().to("cuda" if torch.cuda.is_available() else "cpu")
    rejected = pd.DataFrame(columns=COLUMNS)
    if pairs.file is None:
        parts = pairs_from_manifest(manifest, encoder, pairs)
    else:
        preferences, rejected = read_preferences(pairs.file.expanduser())
        parts = pairs_from_preferences(preferences, encoder)
    return partial(write_pairs, parts=parts, encoder_key=_encoder_key(encoder)), rejected


def train_text_image(
    pairs: Path, training: RewardTrainingConfig, checkpoints: CheckpointStore, metric_stream: MetricStream
) -> tuple[FolderWriter, dict[str, Any]]:
    """The text-image reward: see `train_reward`."""
    return train_reward(pairs, training, "trained", checkpoints, metric_stream)


def train_held_out(
    pairs: Path, training: RewardTrainingConfig, checkpoints: CheckpointStore, metric_stream: MetricStream
) -> tuple[FolderWriter, dict[str, Any]]:
    """The held-out reward, trained on other pictures; feedback is never trained on it. See `train_reward`."""
    return train_reward(pairs, training, "held_out", checkpoints, metric_stream)


def train_reward(
    pairs: Path, training: RewardTrainingConfig, role: Role, checkpoints: CheckpointStore, metric_stream: MetricStream
) -> tuple[FolderWriter, dict[str, Any]]:
    """Train one reward by eq. 9 on its part of the pairs.

    Its scores are standardised on the test part's winners: both the head and the dual encoder score what they were trained on too high.
    Ranks, and with them the accuracies, do not depend on it.

    Returns:
        A writer of ``reward.safetensors``, and the report: `train`'s figures, and for each kind of pair ``accuracy/<kind>`` and
        ``pairs/<kind>`` on the test part.

    Raises:
        UserError: the pairs are missing or were made with another encoder, or the head does not fit the encoder.
    """
    encoder = load_dual_encoder()
    _check_head(training, encoder)
    accelerator = make_accelerator(training.loop)
    device = accelerator.device
    encoder.to(device)
    (data, key), (test, _) = (read_pairs(pairs, part, _encoder_key(encoder)) for part in (role, "test"))
    torch.manual_seed(training.loop.seed)  # the head's initialisation; every other draw is the loop's generator's
    head = TextImageHead(training.head)
    head.whiten_(data.image, data.text)
    head.to(device)
    figures = train(
        f"reward {role}",
        parameters=head.parameters(),
        loss_fn=_Loss(head, encoder, data, training, device),
        config=training.loop,
        state={"head": head},
        key=fingerprint({**training.model_dump(mode="json"), "loop": training.loop.identity()}, role, key, _encoder_key(encoder)),
        checkpoints=checkpoints,
        metrics=metric_stream,
        accelerator=accelerator,
    )
    head.eval().requires_grad_(False)
    winners = _winners(head, encoder, test)
    if len(winners) < FEW:
        winners = _winners(head, encoder, data)
    head.standardise_(float(winners.mean()), float(winners.std()))
    report = {**figures, **accuracies(head, encoder, test)}
    recipe = {"training": training.model_dump(mode="json"), "pairs": key, **report}
    return partial(_write, head=head, encoder=encoder, role=role, recipe=recipe), report


def _write(folder: Path, head: TextImageHead, encoder: DualEncoder, role: Role, recipe: dict[str, Any]) -> None:
    save_text_image(head, encoder, role, folder / FILE, recipe)


def _encoder_key(encoder: DualEncoder) -> str:
    return tensors_hash(encoder.trained_tensors())


def _check_head(training: RewardTrainingConfig, encoder: DualEncoder) -> None:
    own, given = encoder.config.embed_dim, training.head.embed_dim
    if training.head.inputs == "embeddings" and given != own:
        raise UserError(f"training.head.embed_dim: is {given}, the dual encoder's embeddings have {own}; set it to {own}.")


class _Loss:
    """Eq. 9 on random pairs, with dropout on the towers' features; all draws come from the loop's generator."""

    def __init__(self, head: TextImageHead, encoder: DualEncoder, data: PairSet, training: RewardTrainingConfig, device: Any) -> None:
        self.head, self.encoder, self.data, self.p, self.device = head, encoder, data, training.feature_dropout, device
        self.size = training.loop.batch_size // training.loop.accumulate

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = self.data.pairs[torch.randint(len(self.data), (self.size,), generator=generator)]
        keep = [torch.rand(self.size, x.shape[1], generator=generator) >= self.p for x in (self.data.image, self.data.text)]
        win, lose = (self._reward(pairs[:, i], pairs[:, i + 1], keep) for i in (0, 2))
        return ranking_loss(win, lose), {"accuracy": (win > lose).float().mean().detach()}

    def _reward(self, image: Tensor, text: Tensor, keep: list[Tensor]) -> Tensor:
        """Both sides of a pair lose the same features: what differs between them must come from the pair."""
        features = [x[rows] * k / (1 - self.p) for x, rows, k in zip((self.data.image, self.data.text), (image, text), keep, strict=True)]
        return self.head(*head_inputs(self.encoder, self.head.config, *(f.to(self.device) for f in features)))


@torch.no_grad()
def _score(head: TextImageHead, encoder: DualEncoder, data: PairSet, rows: Tensor) -> Tensor:
    """Scores of ``rows [n, 2]``: picture and text."""
    device = encoder.device
    image, text = data.image[rows[:, 0]].to(device), data.text[rows[:, 1]].to(device)
    return head(*head_inputs(encoder, head.config, image, text)).cpu()


def _winners(head: TextImageHead, encoder: DualEncoder, data: PairSet) -> Tensor:
    """Scores of all different winners."""
    return _score(head, encoder, data, data.pairs[:, :2].unique(dim=0))


def accuracies(head: TextImageHead, encoder: DualEncoder, test: PairSet) -> dict[str, float]:
    """Per kind: the share of pairs whose winner scores higher, and the number of pairs."""
    right = (_score(head, encoder, test, test.pairs[:, :2]) > _score(head, encoder, test, test.pairs[:, 2:])).float()
    found: dict[str, float] = {}
    for number, name in enumerate(test.kinds):
        chosen = right[test.kind == number]
        if len(chosen):
            found |= {f"accuracy/{name}": float(chosen.mean()), f"pairs/{name}": float(len(chosen))}
    return found
