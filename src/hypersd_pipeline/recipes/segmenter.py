"""Training and test of the small SOLO on the data set's instance masks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from hypersd_pipeline.config import Count, Strict
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.metrics.grids import labelled_grid, to_pil
from hypersd_pipeline.metrics.mask_ap import average_precision
from hypersd_pipeline.perception.annotations import AnnotatedSplit, category_labels
from hypersd_pipeline.perception.config import SmallSoloConfig
from hypersd_pipeline.perception.protocol import Instances, LabelMap, PerceptualModel
from hypersd_pipeline.perception.solo import Solo, load_small_solo, new_small_solo, save_small_solo
from hypersd_pipeline.training.checkpoints import CheckpointStore, Identity
from hypersd_pipeline.training.loop import LoopConfig, MetricSink, make_accelerator, train

log = logging.getLogger(__name__)

FILE = "model.safetensors"
COLOURS = ((230, 60, 60), (60, 160, 240), (70, 190, 80), (240, 190, 40), (190, 90, 220), (250, 130, 30))


class SegmentationModelConfig(Strict):
    """Training and test of a small SOLO.

    Attributes:
        model: its shape.
        classes: with ``object`` there is one class, and the model only tells where things are.
            With ``category`` there is a class per annotated category.
        resolution: images are fitted to this square, as the teacher's are. The embedded data's own is 64.
        flip: mirror every second image.
        test_images: images of a test split at most, the first ones.
        grid_images: rows of the image grid.
        loop: the optimisation.
    """

    model: SmallSoloConfig = SmallSoloConfig()
    classes: Literal["object", "category"] = "object"
    resolution: int = Field(default=64, ge=32, le=8192)
    flip: bool = True
    test_images: Count = 1000
    grid_images: int = Field(default=8, ge=1, le=1000)
    loop: LoopConfig


def train_segmentation_model(
    manifest: Manifest, data: DataConfig, config: SegmentationModelConfig, checkpoints: CheckpointStore, metric_stream: MetricSink
) -> tuple[Callable[[Path], None], dict[str, float]]:
    """Train on the split ``train``.

    It continues from the newest checkpoint made with the same data and configuration.

    Returns:
        A writer of the model's folder (``model.safetensors``), and the loop's report.

    Raises:
        UserError: the data set has no instance masks.
    """
    labels = LabelMap() if config.classes == "object" else category_labels(manifest, data, "train")
    split = AnnotatedSplit(manifest, data, "train", config.resolution, labels)
    model = new_small_solo(config.model, labels, config.loop.seed)
    accelerator = make_accelerator(config.loop)
    model.to(accelerator.device).requires_grad_(True)
    recipe = {"data": manifest.key, **config.model_dump(mode="json", exclude={"loop", "test_images", "grid_images"})}
    report = train(
        "segmentation model",
        parameters=model.parameters(),
        loss_fn=functools.partial(_loss, model, split, split.annotated(), config),
        config=config.loop,
        state={"net": model.net},
        key=Identity({**recipe, "loop": config.loop.identity(), "max_images": data.max_images}),
        checkpoints=checkpoints,
        metrics=metric_stream,
        accelerator=accelerator,
    )
    model.requires_grad_(False).to("cpu")
    return functools.partial(_write, model=model, config=config, recipe={**recipe, "loop": config.loop.model_dump(mode="json")}), report


def _loss(
    model: Solo, split: AnnotatedSplit, rows: Tensor, config: SegmentationModelConfig, generator: torch.Generator
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The loss on a random batch, and its terms."""
    size = config.loop.batch_size // config.loop.accumulate
    images, instances = split.batch(rows[torch.randint(len(rows), (size,), generator=generator)])
    mirrored = torch.rand(size, generator=generator) < (0.5 if config.flip else 0.0)
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    instances = [Instances(i.masks.flip(-1), i.labels) if flip else i for i, flip in zip(instances, mirrored.tolist(), strict=True)]
    terms = model.loss_terms(images.to(model.device), instances)
    return torch.stack(list(terms.values())).sum(), {name: value.detach() for name, value in terms.items()}


def _write(folder: Path, model: Solo, config: SegmentationModelConfig, recipe: dict[str, object]) -> None:
    save_small_solo(model, config.model, folder / FILE, recipe)


def evaluate_segmentation_model(
    folder: Path, manifest: Manifest, data: DataConfig, config: SegmentationModelConfig
) -> tuple[dict[str, float], Image.Image]:
    """Mask AP on the split ``test``, and on ``test_unseen`` (names that training never saw) where there is one.

    Returns:
        ``mask_ap``, ``mask_ap50``, ``mask_ap75``, ``mask_ar``, ``images`` (and ``unseen_...``), and a grid of images, truth and
        predictions.
    """
    model = load_small_solo(folder / FILE).to("cuda" if torch.cuda.is_available() else "cpu")
    test = AnnotatedSplit(manifest, data, "test", config.resolution, model.labels)
    metrics = _metrics(model, test, config.test_images)
    if "test_unseen" in manifest.splits and config.classes == "object":
        unseen = AnnotatedSplit(manifest, data, "test_unseen", config.resolution, model.labels)
        metrics |= {f"unseen_{name}": value for name, value in _metrics(model, unseen, config.test_images).items()}
    log.info("Segmentation model: %s", ", ".join(f"{name} {value:.3g}" for name, value in metrics.items()))
    return metrics, _grid(model, test, config.grid_images)


def _metrics(model: PerceptualModel, split: AnnotatedSplit, limit: int) -> dict[str, float]:
    """Mask AP on the first ``limit`` annotated images, and their number, with no more than one batch of them in memory."""
    found: list[Instances] = []
    truth: list[Instances] = []
    for rows in split.annotated()[:limit].split(50):
        images, instances = split.batch(rows)
        found += [item.to("cpu") for item in model.predict(images.to(model.device))]
        truth += instances
    return {**average_precision(found, truth), "images": float(len(truth))}


def _grid(model: PerceptualModel, split: AnnotatedSplit, rows: int) -> Image.Image:
    chosen = split.annotated()[:rows]
    images, truth = split.batch(chosen)
    found = [_above(item, 0.3) for item in model.predict(images.to(model.device))]
    columns = [
        ("image", [to_pil(image) for image in images]),
        ("truth", [overlay(image, item) for image, item in zip(images, truth, strict=True)]),
        ("found, score > .3", [overlay(image, item.to("cpu")) for image, item in zip(images, found, strict=True)]),
    ]
    return labelled_grid(columns, [split.caption(int(i)) for i in chosen])


def _above(item: Instances, threshold: float) -> Instances:
    assert item.scores is not None
    keep = item.scores > threshold
    return Instances(item.masks[keep], item.labels[keep], item.scores[keep])


def overlay(image: Tensor, item: Instances) -> Image.Image:
    """``[3, h, w]`` in [0, 1] with each mask tinted in a colour of its own."""
    tinted = image.clone()
    for number, mask in enumerate(item.masks):
        colour = torch.tensor(COLOURS[number % len(COLOURS)]).view(3, 1) / 255
        tinted[:, mask] = 0.4 * tinted[:, mask] + 0.6 * colour
    return to_pil(tinted)
