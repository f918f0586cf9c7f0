"""The perceptual models: whom their loss gives gradients, that it is a function of its input, that it can be learned, and their files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hypersd_pipeline  # noqa: F401  # before anything imports torchvision
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.perception import mmdet_nets
from hypersd_pipeline.perception.config import Mask2FormerConfig, SmallSoloConfig, SoloConfig
from hypersd_pipeline.perception.load import load_perceptual_model
from hypersd_pipeline.perception.protocol import COCO_CATEGORY_IDS, Instances, LabelMap, pad_to_multiple
from hypersd_pipeline.perception.solo import load_small_solo, new_small_solo, save_small_solo

KINDS = ("solo", "solov2", "mask2former")
SMALL = {v: SmallSoloConfig(variant=v, input_size=64, base_channels=8, feat_channels=16) for v in ("solo", "solov2")}
LIGHT = "solov2/solov2-light_r18_fpn_ms-3x_coco.py"


def scenes(n=3, height=64, width=64):
    """Bright rectangles on grey, one or two an image, none in the last. And their masks."""
    images, items = torch.full((n, 3, height, width), 0.4), []
    for i in range(n):
        boxes = [(8 + 2 * i, 30, 6, 34), (38, 60, 30, 56)][: 1 + i % 2] if i < n - 1 else []
        masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
        for k, (top, bottom, left, right) in enumerate(boxes):
            masks[k, top:bottom, left:right] = True
            images[i, :, top:bottom, left:right] = torch.tensor([0.9, 0.2 + 0.5 * k, 0.1])[:, None, None]
        items.append(Instances(masks, torch.zeros(len(boxes), dtype=torch.int64)))
    return images, items


@pytest.fixture(scope="module")
def mask2former_folder(tmp_path_factory):
    from transformers import Mask2FormerConfig as Config
    from transformers import Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    stages = {"depths": [1] * 4, "num_heads": [1, 2, 2, 2], "out_features": [f"stage{i}" for i in range(1, 5)]}
    config = Config(
        backbone_config=SwinConfig(image_size=64, embed_dim=16, window_size=4, **stages),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, num_queries=5, train_num_points=256, num_labels=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(mask2former_folder):
    loaded = {v: new_small_solo(config, LabelMap(), seed=0) for v, config in SMALL.items()}
    return loaded | {"mask2former": load_perceptual_model(Mask2FormerConfig(kind="mask2former", weights=str(mask2former_folder)))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As OpenMMLab publishes them: tensors, and plain values about the training."""
    path = tmp_path_factory.mktemp("checkpoint") / "light.pth"
    torch.manual_seed(0)
    net = mmdet_nets.published_solo("solov2", LIGHT)
    torch.save({"meta": {"mmdet_version": "2.0", "CLASSES": ("person",), "epoch": 36}, "state_dict": net.state_dict()}, path)
    return path


def light(path, **changes):
    return SoloConfig(**{"kind": "solo", "variant": "solov2", "weights": str(path), "mmdet_config": LIGHT, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_image_and_no_parameter(models, kind):
    images, items = scenes()
    images.requires_grad_(True)
    models[kind].loss(images, items).backward()
    assert torch.isfinite(images.grad).all()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()  # the one without instances too: nothing is to be found there
    assert not any(p.requires_grad or p.grad is not None for p in models[kind].parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_out_of_range_get_gradients(models, kind):
    images, items = scenes()
    images = (images * 6 - 3).requires_grad_(True)
    models[kind].loss(images, items).backward()
    out = (images < 0) | (images > 1)
    assert out.all() and (images.grad[out] != 0).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_a_function_of_its_input(models, kind):
    model, (images, items) = models[kind], scenes()
    torch.manual_seed(1)
    first = model.loss(images, items)
    state = torch.get_rng_state()
    model.predict(images)
    model.eval()  # a caller may well do that
    assert torch.equal(model.loss(images, items), first)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.loss(images, items), first)
    assert model.loss(images, [items[1], items[0], items[2]]) != first


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_in_training_and_the_model_finds_what_it_saw(models, kind, mask2former_folder):
    images, items = scenes()
    model = new_small_solo(SMALL[kind], LabelMap(), seed=0) if kind in SMALL else None
    model = model or load_perceptual_model(Mask2FormerConfig(kind="mask2former", weights=str(mask2former_folder)))
    optimiser = torch.optim.AdamW(model.requires_grad_(True).parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = model.loss(images, items)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    if kind == "solov2":
        best, mask = model.predict(images[:1])[0].masks[0], items[0].masks[0]
        assert (best & mask).sum() / (best | mask).sum() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_are_no_multiple_of_32(models, kind):
    images, items = scenes(2, height=70, width=62)
    assert torch.isfinite(models[kind].loss(images, items))
    for found in models[kind].predict(images):
        assert found.masks.shape == (len(found), 70, 62) and found.masks.dtype == torch.bool
        assert found.labels.dtype == torch.int64 and found.scores.shape == (len(found),)
        assert torch.equal(found.scores, found.scores.sort(descending=True).values)


def test_padding_is_right_and_below():
    padded = pad_to_multiple(torch.ones(1, 3, 33, 32), 32)
    assert padded.shape == (1, 3, 64, 32) and padded.sum() == 3 * 33 * 32


def test_loss_equals_mmdets_own_pipeline(checkpoint):
    """mmdet's preprocessor (BGR bytes, its mean and deviation, its padding) in front of the same network."""
    from mmdet.models import DetDataPreprocessor
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    model = load_perceptual_model(light(checkpoint))
    images, items = scenes(2, height=72, width=100)
    images = (images * 255).round() / 255
    samples = []
    for item in items:
        bitmaps = BitmapMasks(item.masks.numpy().astype("uint8"), 72, 100)
        sample = DetDataSample(metainfo={"img_shape": (72, 100), "ori_shape": (72, 100)})
        sample.gt_instances = InstanceData(masks=bitmaps, labels=item.labels, bboxes=bitmaps.get_bboxes("hbox").tensor)
        samples.append(sample)
    preprocessor = DetDataPreprocessor(
        [123.675, 116.28, 103.53], [58.395, 57.12, 57.375], pad_size_divisor=32, pad_mask=True, bgr_to_rgb=True
    )
    data = preprocessor({"inputs": [(image.flip(0) * 255).to(torch.uint8) for image in images], "data_samples": samples}, training=True)
    model.net.train()
    expected, _ = model.net.parse_losses(model.net.loss(data["inputs"], data["data_samples"]))
    assert model.loss(images, items).item() == pytest.approx(expected.item(), rel=1e-4)


def test_saved_and_loaded_predicts_the_same(tmp_path):
    images, items = scenes()
    model = new_small_solo(SMALL["solov2"].model_copy(update={"score_threshold": 0.0}), LabelMap(), seed=3)
    path = tmp_path / "folder" / "model.safetensors"
    save_small_solo(model, SMALL["solov2"].model_copy(update={"score_threshold": 0.0}), path, {"why": "test"})
    loaded = load_perceptual_model(SoloConfig(kind="solo", weights=str(path)))
    assert torch.equal(loaded.loss(images, items), model.loss(images, items))
    for one, other in zip(model.predict(images), loaded.predict(images), strict=True):
        assert len(one) and torch.equal(one.masks, other.masks) and torch.equal(one.scores, other.scores)
    with pytest.raises(UserError, match="holds a solov2, not a solo; correct variant"):
        load_perceptual_model(SoloConfig(kind="solo", variant="solo", weights=str(path)))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match="sha256"):
        load_small_solo(path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match=r"gone.safetensors is missing; run 'kedro run --pipelines segmentation_model'"):
        load_perceptual_model(SoloConfig(kind="solo", weights=str(tmp_path / "gone.safetensors")))
    with pytest.raises(UserError, match=r"gone.pth is missing; download it"):
        load_perceptual_model(SoloConfig(kind="solo", weights=str(tmp_path / "gone.pth")))
    with pytest.raises(UserError, match="there is no folder"):
        load_perceptual_model(Mask2FormerConfig(kind="mask2former", weights=str(tmp_path / "gone")))
    with pytest.raises(ValueError, match="sha256"):
        SoloConfig(kind="solo", weights="https://example.org/solo.pth")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors"):
        load_perceptual_model(SoloConfig(kind="solo", weights=str(tmp_path / "other.safetensors")))


def test_published_checkpoint(checkpoint):
    model = load_perceptual_model(light(checkpoint))
    assert model.labels.category_ids == COCO_CATEGORY_IDS and len(model.labels) == 80
    assert (model.labels.names[0], model.labels.names[model.labels.label(90)]) == ("person", "toothbrush")
    assert model.labels.label(12) is None  # a number that COCO does not use
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    images, items = scenes()
    images.requires_grad_(True)
    model.loss(images, items).backward()
    assert images.grad.norm() > 0
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())  # BatchNorm's statistics too


def test_wrong_checkpoints(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"sha256 is .*, not 0000"):
        load_perceptual_model(light(checkpoint, sha256="0" * 64))
    with pytest.raises(UserError, match=r"not the weights of mmdet's solov2/solov2_r50"):
        load_perceptual_model(light(checkpoint, mmdet_config=None))
    with pytest.raises(UserError, match="80 classes, but there are 2 category_ids"):
        load_perceptual_model(light(checkpoint, category_ids=(1, 2)))
    with pytest.raises(UserError, match="network SOLOv2, not SOLO"):
        load_perceptual_model(light(checkpoint, variant="solo"))
    with pytest.raises(UserError, match="mmdet has no configuration"):
        load_perceptual_model(light(checkpoint, mmdet_config="../../../../../../etc/passwd"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state_dict"):
        load_perceptual_model(light(tmp_path / "list.pth"))


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_wants_to_run_code_is_refused(tmp_path):
    from mmengine.logging import HistoryBuffer

    contents = {"payload.pth": Payload(tmp_path / "ran"), "training.pth": {"train/loss": HistoryBuffer([1.0], [1])}}
    for name, extra in contents.items():
        torch.save({"state_dict": {"a": torch.ones(1)}, "message_hub": extra}, tmp_path / name)
        with pytest.raises(UserError, match="keep its state_dict only"):
            load_perceptual_model(light(tmp_path / name))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("variant", "kernel"), [("solo", (40**2, 256, 1, 1)), ("solov2", (256, 512, 3, 3))])
def test_the_published_networks_are_the_papers(variant, kernel):
    with torch.device("meta"):  # shapes only
        net = mmdet_nets.published_solo(variant, None)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["mask_head.conv_mask_list.0.weight" if variant == "solo" else "mask_head.conv_kernel.weight"] == kernel
    assert shapes["mask_head.conv_cls.weight"][0] == 80
    assert shapes["backbone.layer4.2.conv3.weight"] == (2048, 512, 1, 1)  # ResNet-50
    assert type(net.mask_head.loss_cls).__name__ == "OneHotFocalLoss"


def test_one_hot_focal_loss_has_mmdets_value():
    from mmdet.models.losses import FocalLoss

    logits, target = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 4
    assert torch.equal(mmdet_nets.OneHotFocalLoss()(logits, target, avg_factor=7), FocalLoss()(logits, target, avg_factor=7))


def test_a_compiled_operator_says_that_it_is_missing():
    import mmcv
    from mmcv.ops import nms

    if mmcv._ext.__class__.__name__ != "_NoOperators":
        pytest.skip("mmcv has compiled operators here")
    with pytest.raises(NotImplementedError, match="mmcv-lite"):
        nms(torch.rand(2, 4), torch.rand(2), 0.5)


def test_batches_that_do_not_fit(models):
    images, items = scenes()
    model = models["solo"]
    with pytest.raises(ValueError, match="3 images, but the instances of 2"):
        model.loss(images, items[:2])
    with pytest.raises(ValueError, match="not float"):
        model.loss((images * 255).byte(), items)
    with pytest.raises(ValueError, match="image 0: masks are"):
        model.loss(images, [Instances(items[0].masks[..., :32], items[0].labels), *items[1:]])


def test_registering_the_pipelines_imports_no_mmdet():
    code = """
import sys
from kedro.framework.project import configure_project, pipelines
import hypersd_pipeline
assert not {"torch", "mmdet", "mmcv", "cv2"} & set(sys.modules)
configure_project("hypersd_pipeline")
assert "segmentation_model" in dict(pipelines)
assert not {"mmdet", "mmcv", "mmengine", "cv2"} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": "src"}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
