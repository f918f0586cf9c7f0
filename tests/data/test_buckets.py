"""Aspect-ratio buckets: their sizes, what the cache has of an image, and batches of one bucket on any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from ranks import on_ranks

from hypersd_pipeline.data.buckets import Buckets, nearest
from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.cache_build import build_cache, fill_cache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.images import decode_image, fit
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.draws import Draws
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.training import distributed
from hypersd_pipeline.training.rollouts import draw_rows, shape_of

SIZES = [(60, 60), (60, 120), (130, 70), (64, 100), (90, 90), (100, 64), (61, 119), (70, 130), (128, 64)]  # (height, width)


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tiny.write_teacher(tmp_path_factory.mktemp(request.param), request.param)
    return load_teacher(TeacherConfig(source=str(folder)), ("vae", "text"), "cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", len(SIZES)), ("test", 4)):
        (root / split).mkdir()
        for i, (height, width) in enumerate(SIZES[:count]):
            pixels = np.random.default_rng([i, count]).integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"{i:02d}.png")
            (root / split / f"{i:02d}.txt").write_text(f"image {i}\na photo\n")
    return validate(config().source.model_copy(update={"root": str(root)}), Path("unused"))[0]


def config(**extra) -> DataConfig:
    buckets = {"step": 16, "aspect": 2.0}
    return DataConfig(source={"kind": "folder", "root": "unused"}, **{"shard_rows": 2, "batch_size": 2, "buckets": buckets, **extra})


@pytest.fixture(scope="module")
def cache(teacher: Teacher, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    path = tmp_path_factory.mktemp("cache") / "latents"
    build_cache(path, manifest, config(sizes="image"), teacher)
    return LatentCache(path)


def test_sizes_have_the_area_of_the_square_and_multiples_of_the_step_as_sides() -> None:
    sizes = Buckets(step=64, aspect=2.0).sizes(1024)
    assert sizes == [
        (1408, 704), (1344, 768), (1216, 832), (1152, 896), (1088, 960), (1024, 1024),
        (960, 1088), (896, 1152), (832, 1216), (768, 1344), (704, 1408),
    ]  # fmt: skip  # SDXL's list (appendix I) has these and some that are smaller
    assert Buckets(aspect=1.0).sizes(512) == [(512, 512)]
    assert Buckets(step=16).sizes(64) == [(80, 48), (64, 64), (48, 80)]
    assert [sizes[nearest(sizes, *image)] for image in ((500, 500), (4000, 3000), (480, 640), (100, 900))] == [
        (1024, 1024), (896, 1152), (1152, 896), (1408, 704)
    ]  # fmt: skip


def test_rows_have_the_latents_of_their_images_in_their_buckets(teacher: Teacher, manifest: Manifest, cache: LatentCache) -> None:
    sizes = Buckets(step=16).sizes(64)
    train = cache.split("train")
    assert len(train) == len(SIZES) and train.latent_shape == (4, 8, 8)
    assert train.bucket_shapes == [(4, 10, 6), (4, 8, 8), (4, 6, 10)]
    for number, row in enumerate(manifest.splits["train"]):
        height, width = sizes[nearest(sizes, row.width, row.height)]
        pixels, (top, left) = fit(decode_image(manifest.path(row).read_bytes()), (height, width))
        with torch.no_grad():
            mean, _ = teacher.encode_images(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)
        at = torch.tensor([number])
        torch.testing.assert_close(train.sample(at, None), mean, atol=1e-5, rtol=1e-4)
        assert train.shape_of(number) == mean.shape[1:] and train.captions(at) == [f"image {number}"]
        cond = train.conditioning(at)
        if teacher.layout == "sdxl":
            assert cond.sizes.tolist() == [[row.height, row.width, top, left, height, width]]
    tall = train.alike(2)
    assert tall.tolist() == [2, 5, 8] and train.sample(tall, torch.Generator().manual_seed(0)).shape == (3, 4, 10, 6)
    with pytest.raises(ValueError, match="several buckets"):
        train.sample(torch.tensor([0, 1]), None)
    with pytest.raises(IndexError):
        train.sample(torch.tensor([-1]), None)


def test_the_crop_is_the_one_of_the_resized_image() -> None:
    wide = Image.new("RGB", (100, 40), "red")
    wide.paste("blue", (0, 0, 10, 40))
    pixels, crop = fit(wide, (20, 40))
    assert pixels.shape == (20, 40, 3) and crop == (0, 5) and (pixels[:, 2:] == [255, 0, 0]).all()


def test_default_sizes_are_those_of_the_bucket(tmp_path: Path, teacher: Teacher, manifest: Manifest, cache: LatentCache) -> None:
    build_cache(tmp_path / "latents", manifest, config(), teacher)
    default = LatentCache(tmp_path / "latents")
    assert [[e["key"] for e in entries] for entries in default.index["splits"].values()] == [
        [e["key"] for e in entries] for entries in cache.index["splits"].values()
    ]
    if teacher.layout == "sdxl":
        assert default.split("train").conditioning(torch.tensor([0, 1])).sizes.tolist() == [[64, 64, 0, 0, 64, 64], [48, 80, 0, 0, 48, 80]]
    plain = tmp_path / "plain"
    build_cache(plain, manifest, config(buckets=None), teacher)
    assert LatentCache(plain).parts.keys() == default.parts.keys() - {"buckets"} and LatentCache(plain).split("train").bucket_shapes == []


def test_an_update_has_one_bucket_on_any_number_of_processes_and_passes(cache: LatentCache) -> None:
    train = cache.split("train")
    drawn = []
    for parts in (1, 2, 4):
        generators = [Draws() for _ in range(parts)]
        for generator in generators:
            generator.manual_seed(3)
        batches = []
        for _ in range(20):
            rows = []
            for part, generator in enumerate(generators):
                generator.take(0, 1, part, parts)
                rows.append(draw_rows(train, 8 // parts, generator))
                assert {train.shape_of(int(row)) for row in rows[-1]} == {shape_of(train, rows[-1])}
                train.sample(rows[-1], None)
            batches.append(torch.stack(rows, 1).flatten())  # every n-th row of the whole batch
        drawn.append(torch.stack(batches))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert len({train.shape_of(int(batch[0])) for batch in drawn[0]}) == 3
    once = Draws()
    once.manual_seed(3)
    passes = []
    for part in range(4):
        once.take(part, 4)
        passes.append(draw_rows(train, 2, once))
    assert torch.equal(torch.cat(passes), drawn[0][0])


def test_several_processes_write_the_same_bytes(tmp_path: Path, teacher: Teacher, manifest: Manifest) -> None:
    def fill(path: Path) -> int:
        fill_cache(path, manifest, config(), teacher, distributed.rank(), distributed.ranks(), distributed.wait)
        return 0

    written = []
    for count in (1, 3):
        path = tmp_path / str(count)
        others = (lambda: on_ranks(3, tmp_path / "ranks", lambda: fill(path))) if count > 1 else None  # noqa: B023
        build_cache(path, manifest, config(), teacher, others)
        written.append({file.name: file.read_bytes() for file in path.iterdir()})
    assert written[0] == written[1]


def test_a_step_that_does_not_fit_the_teacher_is_refused(tmp_path: Path, teacher: Teacher, manifest: Manifest) -> None:
    for step in (24, 4):
        with pytest.raises(
            UserError, match=rf"data\.buckets\.step is {step}: it has to divide .* 64, and its VAE needs a multiple of 8; use 64"
        ):
            build_cache(tmp_path / "latents", manifest, config(buckets={"step": step}), teacher)
