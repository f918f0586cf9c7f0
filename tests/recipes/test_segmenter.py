"""The segmentation model's training as a whole, on a few of the embedded scenes."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.twemoji import write_dataset
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.perception.config import SoloConfig
from hypersd_pipeline.perception.load import load_perceptual_model
from hypersd_pipeline.perception.protocol import Instances
from hypersd_pipeline.recipes.segmenter import SegmentationModelConfig, evaluate_segmentation_model, overlay, train_segmentation_model
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS
from hypersd_pipeline.training.checkpoints import CheckpointStore

CONFIG = SegmentationModelConfig(
    model={"input_size": 64, "base_channels": 8, "feat_channels": 16},
    grid_images=2,
    loop={"steps": 4, "batch_size": 4, "accumulate": 2, "learning_rate": 1e-3, "log_every": 1, "checkpoint_every": 2},
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    data = DataConfig(source={"kind": "twemoji", "train": 16, "val": 2, "test": 6, "test_unseen": 4})
    folder = tmp_path_factory.mktemp("scenes")
    write_dataset(folder, data.source.scenes())
    return data, validate(data.source, folder)[0]


def trained(scenes, folder, config=CONFIG, stream=lambda values, step: None):
    data, manifest = scenes
    write, report = train_segmentation_model(manifest, data, config, CheckpointStore(folder / "checkpoints"), stream)
    (folder / "model").mkdir(exist_ok=True)
    write(folder / "model")
    return load_perceptual_model(SoloConfig(kind="solo", weights=str(folder / "model" / "model.safetensors"))), report


def test_stopped_and_continued_equals_uninterrupted(scenes, tmp_path):
    seen = []
    whole, report = trained(scenes, tmp_path, stream=lambda values, step: seen.append(values))
    assert report["final_loss"] > 0 and {"loss_mask", "loss_cls"} <= seen[0].keys()

    def stop(values, step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(scenes, tmp_path / "again", stream=stop)
    again, _ = trained(scenes, tmp_path / "again")
    state = again.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.net.state_dict().items())


def test_metrics_and_grid_of_both_test_splits(scenes, tmp_path):
    trained(scenes, tmp_path)
    data, manifest = scenes
    metrics, grid = evaluate_segmentation_model(tmp_path / "model", manifest, data, CONFIG)
    names = ("mask_ap", "mask_ap50", "mask_ap75", "mask_ar")
    assert metrics.keys() == {*names, "images", *(f"unseen_{name}" for name in (*names, "images"))}
    assert (metrics["images"], metrics["unseen_images"]) == (6, 4)
    assert all(0 <= metrics[name] <= 1 for name in names)
    assert isinstance(grid, Image.Image) and grid.width > 3 * 128


def test_a_class_per_category(scenes, tmp_path):
    model, _ = trained(scenes, tmp_path, CONFIG.model_copy(update={"classes": "category"}))
    assert len(model.labels) == model.net.mask_head.num_classes > 10
    assert model.labels.category_ids == tuple(sorted(set(model.labels.category_ids)))
    with torch.no_grad():
        assert model.net.mask_head.conv_cls.weight.shape[0] == len(model.labels)


@pytest.mark.parametrize("env", ["base", "smoke", "sd15", "sdxl"])
def test_every_environment_is_valid(env):
    loader = ProjectConfigLoader(str(Path(__file__).parents[2] / "conf"), env=env, **{**CONFIG_LOADER_ARGS, "default_run_env": env})
    config = SegmentationModelConfig(**loader["parameters"]["segmentation_model"])
    assert config.loop.steps == (3 if env == "smoke" else 1800)


def test_overlay_tints_the_masks_only():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:4, 3:6] = True
    image = torch.full((3, 8, 8), 0.5)
    tinted = overlay(image, Instances(mask, torch.zeros(1, dtype=torch.int64)))
    changed = [(x, y) for y in range(8) for x in range(8) if tinted.getpixel((x, y)) != (128, 128, 128)]
    assert changed == [(x, y) for y in (2, 3) for x in (3, 4, 5)]
    assert image.eq(0.5).all()
