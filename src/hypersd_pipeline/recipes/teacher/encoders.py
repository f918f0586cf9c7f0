"""Training of the dual encoder's projections and of the image-quality head. Minutes on one core."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hypersd_pipeline.data.degradations import DEGRADATIONS, degrade
from hypersd_pipeline.files import fingerprint, tensors_sha256
from hypersd_pipeline.models.dual_encoder import TRAINED, DualEncoder, features_of_captions, features_of_images, tower_hashes
from hypersd_pipeline.models.quality_head import QualityHead, QualityHeadConfig
from hypersd_pipeline.objectives.contrastive import info_nce
from hypersd_pipeline.objectives.ranking import ranking_loss
from hypersd_pipeline.recipes.teacher.config import DualEncoderTraining, QualityHeadTraining
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.loop import MetricSink, make_accelerator, make_optimizer, train

MAX_SCALE = 100.0
"""The largest inverse temperature, CLIP's."""


def retrieval_at_1(encoder: DualEncoder, images: Tensor, captions: Sequence[str]) -> float:
    """R@1 from text to image over uint8 images ``[n, 3, h, w]``, in [0, 1]. A pick with the same caption counts as right."""
    picks = encoder.project_texts(features_of_captions(encoder, captions)) @ encoder.project_images(features_of_images(encoder, images)).T
    return float(np.mean([captions[j] == caption for caption, j in zip(captions, picks.argmax(1).tolist(), strict=True)]))


# --- the dual encoder --------------------------------------------------------------------------------------------------------------------


def train_dual_encoder(
    images: Tensor,
    captions: Sequence[str],
    config: DualEncoderTraining,
    data_key: str,
    checkpoints: CheckpointStore,
    metrics: MetricSink,
) -> tuple[DualEncoder, dict[str, float]]:
    """Train the two projections and the logit scale with InfoNCE on frozen towers.

    It continues from the newest checkpoint made with the same data and configuration.
    Weight decay acts on the projections alone: it would pull the logit scale, a single number far from zero, to a high temperature.
    So the logit scale has an optimiser of its own, a companion of the loop, without weight decay and at a constant learning rate.

    Args:
        images: uint8 ``[n, 3, h, w]``.
        captions: one each.
        data_key: names images and captions: a checkpoint made on other ones is not continued.

    Returns:
        The encoder (frozen, ``eval``, on the training's device), and ``dual_encoder_loss``.
    """
    accelerator = make_accelerator(config.loop)
    torch.manual_seed(config.loop.seed)  # for the initialisation: every other draw is from the loop's generator
    encoder = DualEncoder(config.model).to(accelerator.device)
    loss_fn = _InfoNce(encoder, images, captions, config)
    _whiten_(encoder, loss_fn.image, loss_fn.text)
    *projections, scale = trained = [encoder.get_parameter(f"clip.{name}") for name in TRAINED]
    for parameter in trained:
        parameter.requires_grad_(True)
    report = train(
        "dual encoder",
        parameters=projections,
        loss_fn=loss_fn,
        config=config.loop,
        state={"trained": _Trained(encoder)},
        key=fingerprint("dual encoder", {**config.model_dump(mode="json"), "loop": config.loop.identity()}, tower_hashes(), data_key),
        checkpoints=checkpoints,
        metrics=metrics,
        accelerator=accelerator,
        companions={"logit_scale": make_optimizer([scale], config.loop.model_copy(update={"weight_decay": 0.0}))},
    )
    return encoder.requires_grad_(False), {"dual_encoder_loss": report["final_loss"]}


class _Trained:
    """The state of the trained tensors alone: the towers never change."""

    def __init__(self, encoder: DualEncoder) -> None:
        self.encoder = encoder

    def state_dict(self) -> dict[str, Tensor]:
        return self.encoder.trained_tensors()

    def load_state_dict(self, state_dict: dict[str, Tensor], /) -> None:
        self.encoder.clip.load_state_dict(state_dict, strict=False)


def _whiten_(encoder: DualEncoder, image: Tensor, text: Tensor) -> None:
    """Start the projections on standardised features ``[n, d]``: the deviation goes into the weights, the image mean into the bias."""
    image_head, text_head = encoder.clip.visual.head.proj, encoder.clip.text.proj
    torch.nn.init.orthogonal_(image_head.weight)
    torch.nn.init.orthogonal_(text_head.weight)
    image_head.weight.data.div_(image.std(0) + 0.1)
    image_head.bias.data.copy_(-image_head.weight.data @ image.mean(0))
    text_head.weight.data.div_(text.std(0) + 1e-3)


class _InfoNce:
    """InfoNCE on random images and captions, with dropout on the towers' features. All draws come from the loop's generator."""

    def __init__(self, encoder: DualEncoder, images: Tensor, captions: Sequence[str], config: DualEncoderTraining) -> None:
        self.encoder, self.p, self.ids = encoder, config.feature_dropout, _ids(captions)
        self.image, self.text = features_of_images(encoder, images), features_of_captions(encoder, captions)
        self.size = config.loop.batch_size // config.loop.accumulate

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.randint(len(self.ids), (self.size,), generator=generator)
        image, text = (_dropout(x[rows.to(x.device)], self.p, generator) for x in (self.image, self.text))
        ids = self.ids[rows].to(image.device)
        scale = self.encoder.clip.logit_scale.clamp(max=math.log(MAX_SCALE)).exp()
        loss = info_nce(self.encoder.project_images(image), self.encoder.project_texts(text), scale, ids[:, None] == ids[None])
        return loss, {"scale": scale.detach()}


def _ids(captions: Sequence[str]) -> Tensor:
    """int64 ``[n]``: the row of each caption's first occurrence."""
    first = {c: i for i, c in reversed(list(enumerate(captions)))}
    return torch.tensor([first[c] for c in captions])


def _dropout(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    keep = torch.rand(x.shape, generator=generator) >= p
    return x * keep.to(x.device) / (1 - p)


# --- the image-quality head --------------------------------------------------------------------------------------------------------------


def train_quality_head(
    images: Tensor, encoder: DualEncoder, config: QualityHeadTraining, data_key: str, checkpoints: CheckpointStore, metrics: MetricSink
) -> tuple[QualityHead, dict[str, float]]:
    """Train the head by eq. 9 on clean-against-degraded pairs, whose embeddings are computed once.

    It continues from the newest checkpoint made with the same data, encoder and configuration.

    Args:
        images: clean, uint8 ``[n, 3, h, w]``. The first ``config.images`` are used.
        encoder: frozen.
        data_key: names the images: a checkpoint made on other ones is not continued.

    Returns:
        The head (frozen, ``eval``, on the encoder's device), and the pair accuracy on held-out images: ``pair_accuracy`` and
        ``pair_accuracy/<degradation>``.
    """
    clean, worse, kinds = _embeddings(images[: config.images], encoder, config)
    held = len(clean) // 10
    accelerator = make_accelerator(config.loop)
    torch.manual_seed(config.loop.seed)  # for the initialisation: every other draw is from the loop's generator
    head = QualityHead(QualityHeadConfig(embed_dim=clean.shape[1], hidden=config.hidden)).to(accelerator.device)
    recipe = {**config.model_dump(mode="json"), "loop": config.loop.identity()}
    train(
        "quality head",
        parameters=head.parameters(),
        loss_fn=_Ranking(head, clean[held:], worse[held:], config, accelerator.device),
        config=config.loop,
        state={"head": head},
        key=fingerprint("quality head", recipe, tensors_sha256(encoder.trained_tensors()), data_key),
        checkpoints=checkpoints,
        metrics=metrics,
        accelerator=accelerator,
    )
    head.eval().requires_grad_(False).to(encoder.device)
    scores = head(clean[held:])
    head.standardise_(float(scores.mean()), float(scores.std()))
    return head, _pair_accuracies(head, clean[:held], worse[:held], kinds[:held])


def _embeddings(images: Tensor, encoder: DualEncoder, config: QualityHeadTraining) -> tuple[Tensor, Tensor, np.ndarray]:
    """Embeddings of clean images ``[n, d]`` and of degraded versions ``[n, pairs, d]``, and the degradations' names ``[n, pairs]``."""
    rng = np.random.default_rng(config.loop.seed)
    rounds = [degrade(images, rng) for _ in range(config.pairs_per_image)]
    with torch.no_grad():
        clean, *worse = (encoder.project_images(features_of_images(encoder, batch)) for batch in (images, *(made for made, _ in rounds)))
    return clean, torch.stack(worse, 1), np.array([names for _, names in rounds]).T


class _Ranking:
    """Eq. 9 on random pairs of embeddings. All draws come from the loop's generator, those of the head's dropout too."""

    def __init__(self, head: QualityHead, clean: Tensor, worse: Tensor, config: QualityHeadTraining, device: torch.device) -> None:
        self.head, self.clean, self.worse, self.device = head, clean.to(device), worse.to(device), device
        self.size = config.loop.batch_size // config.loop.accumulate

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        rows = torch.randint(len(self.clean), (self.size,), generator=generator).to(self.device)
        columns = torch.randint(self.worse.shape[1], (self.size,), generator=generator).to(self.device)
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)  # dropout draws from the process' own generator, which no checkpoint holds
            win, lose = self.head(self.clean[rows]), self.head(self.worse[rows, columns])
        return ranking_loss(win, lose), {"accuracy": (win > lose).float().mean().detach()}


def pair_accuracy(head: QualityHead, win: Tensor, lose: Tensor) -> float:
    """Share of pairs of embeddings ``[n, d]`` whose first member scores higher."""
    with torch.no_grad():
        return float((head(win) > head(lose)).float().mean())


def _pair_accuracies(head: QualityHead, clean: Tensor, worse: Tensor, kinds: np.ndarray) -> dict[str, float]:
    """Over all pairs of ``clean [n, d]`` and ``worse [n, pairs, d]``, and over those of each kind in ``kinds [n, pairs]`` that occurs."""
    right = (head(clean)[:, None] > head(worse)).cpu().numpy()
    by_kind = {f"pair_accuracy/{kind}": float(right[kinds == kind].mean()) for kind in DEGRADATIONS if (kinds == kind).any()}
    return {"pair_accuracy": pair_accuracy(head, clean[:, None].expand_as(worse), worse), **by_kind}
