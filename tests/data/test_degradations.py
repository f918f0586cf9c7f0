"""The degradations that clean-against-degraded pairs are made with."""

import numpy as np
import torch
from PIL import Image

from hypersd_pipeline.data.degradations import DEGRADATIONS, degrade
from hypersd_pipeline.data.twemoji import TwemojiConfig, make_scene


def test_every_degradation_changes_the_image() -> None:
    image = Image.fromarray(make_scene(TwemojiConfig(), "train", 3).image)
    for name, degradation in DEGRADATIONS.items():
        worse = degradation(image, np.random.default_rng(2))
        assert worse.size == image.size and worse.mode == "RGB", name
        assert not np.array_equal(np.asarray(worse), np.asarray(image)), name


def test_a_batch_is_degraded_image_by_image_and_the_same_every_time() -> None:
    images = torch.from_numpy(np.stack([make_scene(TwemojiConfig(), "train", i).image for i in range(30)])).permute(0, 3, 1, 2)
    worse, names = degrade(images, np.random.default_rng(0))
    assert worse.shape == images.shape and worse.dtype == torch.uint8 and set(names) == set(DEGRADATIONS)
    assert bool((worse != images).flatten(1).any(1).all())
    again, same_names = degrade(images, np.random.default_rng(0))
    assert torch.equal(worse, again) and names == same_names
