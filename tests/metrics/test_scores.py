"""Features, CLIP score, grids: names, ranges, and errors before compute."""

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.metrics.clip_score import OpenClipEncoder, clip_scores, load_clip
from hypersd_pipeline.metrics.config import ClipConfig, EvaluationConfig, FeatureConfig
from hypersd_pipeline.metrics.features import EfficientNetLite0, Inception, centre_crop, crop_side, load_features, metric_name
from hypersd_pipeline.metrics.grids import GAP, HEADER, LABEL_WIDTH, labelled_grid, to_pil
from hypersd_pipeline.metrics.scorer import Scorer


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the FID's Inception-v3 layout (the real ones are a download)."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:  # the class has no way to be built without weights
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None, raising=False)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_metric_names_say_the_features() -> None:
    assert metric_name(EfficientNetLite0.name) == "fd_efficientnet_lite0"
    assert metric_name(Inception.name) == "fid_inception"


def test_efficientnet_resizes_to_its_resolution() -> None:
    images = torch.rand(2, 3, 64, 64)
    features = EfficientNetLite0(64)(images)
    assert features.shape == (2, 1280)
    larger = torch.nn.functional.interpolate(images, scale_factor=2, mode="nearest")
    assert torch.allclose(
        EfficientNetLite0(64)(torch.nn.functional.interpolate(larger, size=(64, 64), mode="bilinear", antialias=True)),
        EfficientNetLite0(64)(larger),
        atol=1e-4,
    )


def test_inception_gives_2048_features_from_a_local_file(inception_weights: Path) -> None:
    digest = hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    extractor = load_features(FeatureConfig(kind="inception", weights=inception_weights, sha256=digest))
    features = extractor(torch.rand(2, 3, 64, 64))
    assert extractor.name == "inception" and features.shape == (2, 2048) and bool(features.isfinite().all())
    stripes = torch.zeros(1, 3, 598, 598)
    stripes[..., ::2] = 1  # the network's own resize would see every second column only
    grey = extractor(torch.full((1, 3, 299, 299), 0.5))
    small, cut = ((extractor(image) - grey).norm() for image in (stripes, stripes[..., :299, :299]))
    assert small < 0.1 * cut


def test_crops_have_the_images_own_pixels_where_the_network_sees_fewer_and_half_of_a_side_otherwise() -> None:
    network = EfficientNetLite0(64)
    assert [crop_side(network, side) for side in (512, 65, 64, 48)] == [64, 64, 32, 24]
    image = torch.arange(36.0).view(1, 1, 6, 6)
    assert centre_crop(image, 2).flatten().tolist() == [14, 15, 20, 21]
    assert centre_crop(image[..., :4], 2).flatten().tolist() == [13, 14, 19, 20]


def test_inception_refuses_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Inception(tmp_path / "missing.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not the FID's"):
        Inception(tmp_path / "other.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickle.pth")
    with pytest.raises(UserError, match="tensors only"):
        Inception(tmp_path / "pickle.pth")


def test_clip_score_is_clamped_cosine_times_100() -> None:
    a = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=-1)
    b = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    assert clip_scores(a, b).tolist() == pytest.approx([0, 100 / 2**0.5])


def test_any_open_clip_model_with_local_weights(tmp_path: Path) -> None:
    """The smallest architecture of open_clip, random weights in a file, against open_clip's own preprocessing."""
    import open_clip

    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("RN50")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoder = load_clip(ClipConfig(model="RN50", pretrained=str(tmp_path / "weights.pt")))
    assert isinstance(encoder, OpenClipEncoder)
    image = Image.effect_noise((96, 64), 80).convert("RGB").resize((192, 128))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(128, 192, 3).permute(2, 0, 1)[None].float() / 255
    model.eval()
    with torch.no_grad():
        expected = model.encode_image(preprocess(image)[None], normalize=True)
        got = encoder.encode_images(pixels)
    assert float((expected * got).sum()) > 0.999  # PIL rounds to 8 bits on the way
    assert encoder.encode_texts(["a fox"]).norm(dim=-1).tolist() == pytest.approx([1.0], rel=1e-5)


def test_clip_model_needs_known_weights() -> None:
    with pytest.raises(UserError, match="needs weights"):
        load_clip(ClipConfig(model="ViT-B-32"))
    with pytest.raises(UserError, match="open_clip cannot load"):
        load_clip(ClipConfig(model="no-such-model", pretrained="openai"))


def test_shared_trunk_changes_no_score() -> None:
    images = torch.rand(3, 3, 64, 64)
    scorer = Scorer(EvaluationConfig(samples=4, unseen_samples=4))
    assert scorer.shared and scorer.distance == "fd_efficientnet_lite0"
    together = scorer.score(images, ["a fox"] * 3)
    scorer.shared = False
    apart = scorer.score(images, ["a fox"] * 3)
    for name in ("features", "embeddings", "quality"):
        assert torch.allclose(getattr(together, name), getattr(apart, name), atol=1e-5)


def test_grid_places_images_under_their_header() -> None:
    red, blue = (to_pil(torch.tensor(c).view(3, 1, 1).expand(3, 8, 8)) for c in ([1.0, 0, 0], [0, 0, 1.0]))
    grid = labelled_grid([("a", [red, blue]), ("b", [blue, red])], ["first", "second"], cell=64)
    assert grid.size == (LABEL_WIDTH + 2 * (64 + GAP), HEADER + 2 * (64 + GAP))
    assert grid.getpixel((LABEL_WIDTH + 30, HEADER + 30)) == (255, 0, 0)
    assert grid.getpixel((LABEL_WIDTH + 64 + GAP + 30, HEADER + 64 + GAP + 30)) == (255, 0, 0)
    assert grid.getpixel((LABEL_WIDTH + 64 + GAP + 30, HEADER + 30)) == (0, 0, 255)
