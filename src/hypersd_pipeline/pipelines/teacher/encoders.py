"""Training of the dual encoder's projections and of the image-quality head, on the train split. Minutes on one core."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from pydantic import Field
from torch import Tensor

from hypersd_pipeline.config import Strict
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.dual_encoder import TRAINED, DualEncoder, DualEncoderConfig
from hypersd_pipeline.models.quality_head import QualityHead, QualityHeadConfig

log = logging.getLogger(__name__)


class DualEncoderTraining(Strict):
    """How the two projections are trained (InfoNCE, AdamW, one-cycle learning rate).

    Attributes:
        batch_size: also the number of candidates in the loss.
        feature_dropout: on the towers' features; they are computed once, so this is the only augmentation.
    """

    model: DualEncoderConfig = DualEncoderConfig()
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=512, ge=2)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.5, ge=0)
    feature_dropout: float = Field(default=0.3, ge=0, lt=1)
    seed: int = 0


class QualityHeadTraining(Strict):
    """How the image-quality head is trained (pairwise ranking, AdamW, one-cycle learning rate).

    Attributes:
        images: how many clean images are used; one in ten is held out for the pair accuracy.
        pairs_per_image: degraded versions of each.
    """

    hidden: int = 128
    images: int = Field(default=4000, ge=10)
    pairs_per_image: int = Field(default=6, ge=1)
    steps: int = Field(default=1500, ge=1)
    batch_size: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    seed: int = 0


def read_pairs(dataset: Path, split: str, limit: int | None = None) -> tuple[Tensor, list[str]]:
    """Images (uint8 ``[n, 3, h, w]``) and first captions of one split of a COCO-format folder whose images have one size.

    Raises:
        UserError: the annotation file is missing or empty.
    """
    path = dataset / "annotations" / f"captions_{split}.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; generate the data set first with 'kedro run --pipelines data_prep'.")
    content = json.loads(path.read_text())
    caption: dict[int, str] = {}
    for row in content["annotations"]:
        caption.setdefault(row["image_id"], row["caption"])
    rows = [row for row in content["images"] if row["id"] in caption][:limit]
    if not rows:
        raise UserError(f"{path}: has no captioned image; generate the data set again.")
    pixels = np.stack([np.asarray(Image.open(dataset / split / row["file_name"]).convert("RGB")) for row in rows])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), [caption[row["id"]] for row in rows]


def _in_batches(function: Callable[[Any], Tensor], items: Any, batch_size: int = 64) -> Tensor:
    with torch.no_grad():
        return torch.cat([function(items[i : i + batch_size]) for i in range(0, len(items), batch_size)])


def image_features(encoder: DualEncoder, images: Tensor) -> Tensor:
    """Pooled vision features ``[n, 1280]`` of uint8 images ``[n, 3, h, w]``."""
    return _in_batches(lambda batch: encoder.image_features(batch.to(encoder.device).float() / 255), images)


def text_features(encoder: DualEncoder, captions: Sequence[str]) -> Tensor:
    """Pooled text features ``[n, 384]``."""
    return _in_batches(lambda batch: encoder.text_features(list(batch)), captions)


def retrieval_at_1(encoder: DualEncoder, images: Tensor, captions: Sequence[str]) -> float:
    """R@1 from text to image over all pairs; a pick with the same caption counts as right."""
    picks = encoder.project_texts(text_features(encoder, captions)) @ encoder.project_images(image_features(encoder, images)).T
    return float(np.mean([captions[j] == caption for caption, j in zip(captions, picks.argmax(1).tolist(), strict=True)]))


def info_nce(image: Tensor, text: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit vectors ``[b, d]``.

    Args:
        scale: the inverse temperature.
        same: bool ``[b, b]``, pairs with an equal caption: they are no negatives.
    """
    logits = (scale * image @ text.T).masked_fill(same & ~torch.eye(len(image), dtype=torch.bool, device=image.device), -torch.inf)
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _whiten_(encoder: DualEncoder, x: Tensor, y: Tensor) -> None:
    """Start the projections on standardised features: the deviation goes into the weights, the image mean into the bias."""
    image, text = encoder.clip.visual.head.proj, encoder.clip.text.proj
    torch.nn.init.orthogonal_(image.weight)
    torch.nn.init.orthogonal_(text.weight)
    image.weight.data.div_(x.std(0) + 0.1)
    image.bias.data.copy_(-image.weight.data @ x.mean(0))
    text.weight.data.div_(y.std(0) + 1e-3)


def train_dual_encoder(
    images: Tensor, captions: Sequence[str], config: DualEncoderTraining, device: str = "cpu"
) -> tuple[DualEncoder, list[float]]:
    """Train the projections with InfoNCE on frozen towers.

    Args:
        images: uint8 ``[n, 3, h, w]``; ``captions``: one each.

    Returns:
        The encoder (frozen, ``eval``) and the loss of every step.
    """
    torch.manual_seed(config.seed)  # the towers' unused random initialisation; everything below uses the generator
    generator = torch.Generator().manual_seed(config.seed)
    encoder = DualEncoder(config.model).to(device)
    x, y = image_features(encoder, images), text_features(encoder, captions)
    caption_id = _ids(captions)
    _whiten_(encoder, x, y)
    trained = [encoder.get_parameter(f"clip.{name}") for name in TRAINED]  # the logit scale last
    for parameter in trained:
        parameter.requires_grad_(True)
    groups: list[dict[str, Any]] = [{"params": trained[:3]}, {"params": trained[3:], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps + 1, pct_start=0.1)
    losses = []
    for _ in range(config.steps):
        pick = torch.randint(len(x), (config.batch_size,), generator=generator)
        drop_x, drop_y = (_dropout(v[pick.to(v.device)], config.feature_dropout, generator) for v in (x, y))
        ids = caption_id[pick]
        scale = encoder.clip.logit_scale.clamp(max=np.log(100)).exp()
        loss = info_nce(encoder.project_images(drop_x), encoder.project_texts(drop_y), scale, (ids[:, None] == ids[None]).to(x.device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    encoder.requires_grad_(False)
    return encoder, losses


def _ids(captions: Sequence[str]) -> Tensor:
    first = {c: i for i, c in reversed(list(enumerate(captions)))}
    return torch.tensor([first[c] for c in captions])


def _dropout(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    keep = torch.rand(x.shape, generator=generator) >= p
    return x * keep.to(x.device) / (1 - p)


Degradation = Callable[[Image.Image, np.random.Generator], Image.Image]


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.7, 2.5)))


def _noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float32)
    return Image.fromarray((pixels + rng.normal(0, rng.uniform(8, 45), pixels.shape)).clip(0, 255).astype(np.uint8))


def _jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(3, 25)))
    return Image.open(buffer).convert("RGB")


def _colour_shift(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Smooth blotches of colour: what a wrong latent decodes to."""
    low = rng.normal(0, rng.uniform(20, 60), (4, 4, 3))
    field = np.stack(
        [np.asarray(Image.fromarray(low[..., c].astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)) for c in range(3)], -1
    )
    return Image.fromarray((np.asarray(image, np.float32) + field).clip(0, 255).astype(np.uint8))


def _swap_patches(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Exchange blocks of an eighth or a quarter of the side: broken shapes with clean texture."""
    pixels = np.array(image)
    side = image.size[0] // int(rng.choice([4, 8]))
    for _ in range(int(rng.integers(2, 9))):
        (y0, x0), (y1, x1) = (rng.integers(0, image.size[0] // side, 2) * side for _ in range(2))
        block = pixels[y0 : y0 + side, x0 : x0 + side].copy()
        pixels[y0 : y0 + side, x0 : x0 + side] = pixels[y1 : y1 + side, x1 : x1 + side]
        pixels[y1 : y1 + side, x1 : x1 + side] = block
    return Image.fromarray(pixels)


def _half_resolution(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = image.size
    method = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR)[int(rng.integers(2))]
    return image.resize((width // 2, height // 2), Image.Resampling.BOX).resize((width, height), method)


DEGRADATIONS: dict[str, Degradation] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "colour_shift": _colour_shift,
    "patch_swap": _swap_patches,
    "half_resolution": _half_resolution,
}


def degrade(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
    """One random degradation of each uint8 image ``[n, 3, h, w]``, and its name; never the image itself."""
    out, names = [], []
    for image in images.permute(0, 2, 3, 1).numpy():
        name = list(DEGRADATIONS)[int(rng.integers(len(DEGRADATIONS)))]
        worse = np.asarray(DEGRADATIONS[name](Image.fromarray(image), rng))
        while np.array_equal(worse, image):  # patches of plain background
            worse = np.asarray(_noise(Image.fromarray(image), rng))
            name = "noise"
        out.append(worse)
        names.append(name)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2), names


def ranking_loss(win: Tensor, lose: Tensor) -> Tensor:
    """``-log sigmoid(r(win) - r(lose))``, the mean over ``[b]`` (Hyper-SD eq. 9)."""
    return F.softplus(lose - win).mean()


def pair_accuracy(head: QualityHead, win: Tensor, lose: Tensor) -> float:
    """Share of pairs of embeddings ``[n, d]`` whose first member scores higher."""
    with torch.no_grad():
        return float((head(win) > head(lose)).float().mean())


def train_quality_head(images: Tensor, encoder: DualEncoder, config: QualityHeadTraining) -> tuple[QualityHead, dict[str, float]]:
    """Train the head on clean-against-degraded pairs; the towers' embeddings are computed once.

    Args:
        images: clean, uint8 ``[n, 3, h, w]``; the first ``config.images`` are used.

    Returns:
        The head (frozen, ``eval``) and the pair accuracy on held-out images: ``pair_accuracy`` and ``pair_accuracy/<degradation>``.
    """
    rng, generator = np.random.default_rng(config.seed), torch.Generator().manual_seed(config.seed)
    clean = images[: config.images]
    embed = encoder.project_images(image_features(encoder, clean))
    rounds = [degrade(clean, rng) for _ in range(config.pairs_per_image)]
    worse = torch.stack([encoder.project_images(image_features(encoder, batch)) for batch, _ in rounds], 1)  # [n, pairs, d]
    held = len(clean) // 10
    torch.manual_seed(config.seed)  # initialisation and dropout
    head = QualityHead(QualityHeadConfig(embed_dim=embed.shape[1], hidden=config.hidden)).to(embed.device)
    _fit_head(head, embed[held:], worse[held:], config, generator)
    head.eval().requires_grad_(False)
    scores = head(embed[held:])
    head.standardise_(float(scores.mean()), float(scores.std()))
    kinds = np.array([names[:held] for _, names in rounds]).T
    report = {"pair_accuracy": pair_accuracy(head, embed[:held, None].expand_as(worse[:held]), worse[:held])}
    right = (head(embed[:held])[:, None] > head(worse[:held])).cpu().numpy()
    return head, report | {f"pair_accuracy/{kind}": float(right[kinds == kind].mean()) for kind in DEGRADATIONS if (kinds == kind).any()}


def _fit_head(head: QualityHead, embed: Tensor, worse: Tensor, config: QualityHeadTraining, generator: torch.Generator) -> None:
    optimiser = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps + 1, pct_start=0.1)
    for _ in range(config.steps):
        row = torch.randint(len(embed), (config.batch_size,), generator=generator).to(embed.device)
        column = torch.randint(worse.shape[1], (config.batch_size,), generator=generator).to(embed.device)
        loss = ranking_loss(head(embed[row]), head(worse[row, column]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
