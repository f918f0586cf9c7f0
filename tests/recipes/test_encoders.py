"""The training of the dual encoder and of the image-quality head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from hypersd_pipeline.data.degradations import degrade
from hypersd_pipeline.data.twemoji import TwemojiConfig, make_scene
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import tensors_sha256
from hypersd_pipeline.models.dual_encoder import (
    DualEncoder,
    DualEncoderConfig,
    features_of_images,
    load_dual_encoder,
    save_dual_encoder,
)
from hypersd_pipeline.models.quality_head import QualityHead, load_quality_head, save_quality_head
from hypersd_pipeline.recipes.teacher.config import DualEncoderTraining, QualityHeadTraining
from hypersd_pipeline.recipes.teacher.encoders import pair_accuracy, retrieval_at_1, train_dual_encoder, train_quality_head
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.loop import MetricSink, TrainingStopped

LOOP: dict[str, Any] = {"batch_size": 32, "schedule": "cosine", "warmup_steps": 4, "log_every": 1, "checkpoint_every": 10}
ENCODER = DualEncoderTraining(
    model=DualEncoderConfig(embed_dim=32), loop={**LOOP, "steps": 40, "learning_rate": 5e-3, "weight_decay": 0.5}
)  # fmt: skip
HEAD = QualityHeadTraining(
    images=40, pairs_per_image=2, hidden=16, loop={**LOOP, "steps": 60, "learning_rate": 1e-3, "weight_decay": 0.05}
)  # fmt: skip


def scenes(n: int) -> tuple[Tensor, list[str]]:
    """Uint8 ``[n, 3, 64, 64]`` and captions of the embedded data."""
    made = [make_scene(TwemojiConfig(), "train", i) for i in range(n)]
    return torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in made]), [s.caption for s in made]


def quiet(metrics: dict[str, float], step: int) -> None:
    """No one listens."""


def stop_at(last: int) -> MetricSink:
    """A metric stream at which the training breaks off."""

    def stop(metrics: dict[str, float], step: int) -> None:
        if step == last:
            raise TrainingStopped("enough")

    return stop


def encoder_of(folder: Path, stream: MetricSink = quiet, config: DualEncoderTraining = ENCODER) -> DualEncoder:
    images, captions = scenes(48)
    return train_dual_encoder(images, captions, config, "scenes", CheckpointStore(folder), stream)[0]


def head_of(folder: Path, encoder: DualEncoder, stream: MetricSink = quiet) -> QualityHead:
    return train_quality_head(scenes(48)[0], encoder, HEAD, "scenes", CheckpointStore(folder), stream)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[DualEncoder, list[dict[str, float]]]:
    """An uninterrupted training, and what it logged."""
    seen: list[dict[str, float]] = []
    return encoder_of(tmp_path_factory.mktemp("encoder"), lambda metrics, step: seen.append(metrics)), seen


def test_tiny_training_learns_the_captions(trained: tuple[DualEncoder, list[dict[str, float]]]) -> None:
    encoder, seen = trained
    images, captions = scenes(48)
    assert len(seen) == 40 and {"scale", "learning_rate", "grad_norm"} <= set(seen[0])
    assert seen[-1]["loss"] < 0.5 * seen[0]["loss"]
    assert retrieval_at_1(encoder, images, captions) > 0.5
    assert not encoder.training and all(not p.requires_grad for p in encoder.parameters())


def test_repeated_training_is_the_same(trained: tuple[DualEncoder, list[dict[str, float]]], tmp_path: Path) -> None:
    losses: list[float] = []
    again = encoder_of(tmp_path, lambda metrics, step: losses.append(metrics["loss"]))
    assert losses == [metrics["loss"] for metrics in trained[1]]
    assert tensors_sha256(again.trained_tensors()) == tensors_sha256(trained[0].trained_tensors())


def test_an_interrupted_dual_encoder_continues_bit_for_bit(trained: tuple[DualEncoder, list[dict[str, float]]], tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped):
        encoder_of(tmp_path, stop_at(25))
    steps: list[int] = []
    resumed = encoder_of(tmp_path, lambda metrics, step: steps.append(step)).trained_tensors()
    assert steps[0] == 21  # from the checkpoint of step 20 on
    assert all(torch.equal(value, resumed[name]) for name, value in trained[0].trained_tensors().items())


def test_a_finished_training_is_read_and_other_data_trains_anew(tmp_path: Path) -> None:
    short = ENCODER.model_copy(update={"loop": ENCODER.loop.model_copy(update={"steps": 2})})
    images, captions = scenes(48)
    store, steps = CheckpointStore(tmp_path), []
    first, metrics = train_dual_encoder(images, captions, short, "scenes", store, lambda m, step: steps.append(step))
    read, same = train_dual_encoder(images, captions, short, "scenes", store, lambda m, step: steps.append(step))
    assert steps == [1, 2] and metrics == same
    assert tensors_sha256(first.trained_tensors()) == tensors_sha256(read.trained_tensors())
    train_dual_encoder(images, captions, short, "others", store, lambda m, step: steps.append(step))
    assert steps == [1, 2, 1, 2]


def test_weight_decay_leaves_the_logit_scale_alone(tmp_path: Path) -> None:
    """One step from the same start: the scale is the same with any decay, the projections are not."""
    made = []
    for number, decay in enumerate((0.0, 10.0)):
        loop = ENCODER.loop.model_copy(update={"steps": 1, "weight_decay": decay})
        made.append(encoder_of(tmp_path / str(number), config=ENCODER.model_copy(update={"loop": loop})).trained_tensors())
    assert torch.equal(made[0]["logit_scale"], made[1]["logit_scale"])
    assert not torch.equal(made[0]["text.proj.weight"], made[1]["text.proj.weight"])


def test_a_batch_without_negatives_is_refused() -> None:
    for loop in ({"batch_size": 1}, {"batch_size": 4, "accumulate": 4}):
        with pytest.raises(ValidationError, match="a single pair has no negatives"):
            DualEncoderTraining(loop={"steps": 1, "learning_rate": 1e-3, **loop})


def test_tiny_head_ranks_what_it_was_trained_on(trained: tuple[DualEncoder, list[dict[str, float]]], tmp_path: Path) -> None:
    encoder, images = trained[0], scenes(48)[0]
    seen: list[dict[str, float]] = []
    head, report = train_quality_head(images, encoder, HEAD, "scenes", CheckpointStore(tmp_path), lambda m, step: seen.append(m))
    assert len(seen) == 60 and {"accuracy", "learning_rate"} <= set(seen[0])
    first, last = (np.mean([metrics["loss"] for metrics in part]) for part in (seen[:10], seen[-10:]))
    assert last < first
    assert 0 <= report["pair_accuracy"] <= 1
    worse, _ = degrade(images[4:40], np.random.default_rng(1))
    embed = [encoder.project_images(features_of_images(encoder, batch)) for batch in (images[4:40], worse)]
    assert pair_accuracy(head, *embed) > 0.6  # the images that it was trained on, freshly degraded
    clean = head(embed[0])
    assert abs(float(clean.mean())) < 0.05 and float(clean.std()) == pytest.approx(1, rel=0.05)


def test_an_interrupted_head_continues_bit_for_bit(trained: tuple[DualEncoder, list[dict[str, float]]], tmp_path: Path) -> None:
    """Its dropout, too, although the process' own generator is elsewhere by then."""
    straight = head_of(tmp_path / "a", trained[0]).state_dict()
    with pytest.raises(TrainingStopped):
        head_of(tmp_path / "b", trained[0], stop_at(35))
    torch.rand(7)
    steps: list[int] = []
    resumed = head_of(tmp_path / "b", trained[0], lambda metrics, step: steps.append(step)).state_dict()
    assert steps[0] == 31  # from the checkpoint of step 30 on
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


def test_both_survive_their_files(trained: tuple[DualEncoder, list[dict[str, float]]], tmp_path: Path) -> None:
    encoder, (images, captions) = trained[0], scenes(48)
    head = head_of(tmp_path / "head", encoder)
    save_dual_encoder(encoder, tmp_path / "encoder.safetensors", {"config": ENCODER.model_dump(mode="json")})
    loaded = load_dual_encoder(tmp_path / "encoder.safetensors")
    pixels = images[:3].float() / 255
    assert torch.equal(loaded.encode_images(pixels), encoder.encode_images(pixels))
    assert torch.equal(loaded.encode_texts(captions[:3]), encoder.encode_texts(captions[:3]))
    save_quality_head(head, encoder, tmp_path / "head.safetensors", {})
    embed = encoder.encode_images(images[4:40].float() / 255)
    assert torch.equal(load_quality_head(loaded, tmp_path / "head.safetensors")(embed), head(embed))
    with pytest.raises(UserError, match="another dual encoder"):
        load_quality_head(load_dual_encoder(), tmp_path / "head.safetensors")
