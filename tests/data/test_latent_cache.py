"""The latent cache on tiny random teachers of both layouts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.cache_build import build_cache, cache_parts
from hypersd_pipeline.data.config import DataConfig, FolderSource
from hypersd_pipeline.data.images import decode_image, fit
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher

N = 10  # training pictures: three shards of four, four and two rows


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tiny.write_teacher(tmp_path_factory.mktemp(request.param), request.param)
    return load_teacher(TeacherConfig(source=str(folder)), ("vae", "text"), "cpu")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tiny.write_teacher(tmp_path_factory.mktemp("sd15"), "sd15")
    return load_teacher(TeacherConfig(source=str(folder)), ("vae", "text"), "cpu")


def pictures(root: Path) -> Path:
    """Pictures of 80 x 64 with two captions each; all share one of them."""
    for split, count in (("train", N), ("val", 2)):
        (root / split).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([i, count]).integers(0, 256, (64, 80, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"{i:02d}.png")
            (root / split / f"{i:02d}.txt").write_text(f"picture {i}\na picture\n")
    return root


def read(root: Path) -> Manifest:
    return validate(FolderSource(kind="folder", root=str(root)), Path("unused"))[0]


def config(**extra) -> DataConfig:
    return DataConfig(source={"kind": "folder", "root": "unused"}, **{"shard_rows": 4, "batch_size": 3, "workers": 2, **extra})


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return read(pictures(tmp_path / "pictures"))


class CountingTeacher:
    """A real teacher that counts what it encodes and, if asked, is interrupted."""

    def __init__(self, teacher: Teacher, stop_after: int | None = None) -> None:
        self._teacher, self.images, self.prompts, self._stop_after = teacher, 0, 0, stop_after

    def __getattr__(self, name: str):
        return getattr(self._teacher, name)

    def encode_images(self, images):
        if self._stop_after is not None and self.images >= self._stop_after:
            raise KeyboardInterrupt
        self.images += len(images)
        return self._teacher.encode_images(images)

    def encode_prompts(self, prompts):
        self.prompts += len(prompts)
        return self._teacher.encode_prompts(prompts)


def test_what_comes_out_is_what_the_teacher_encodes(tmp_path: Path, teacher: Teacher, manifest: Manifest) -> None:
    build_cache(tmp_path / "latents", manifest, config(), teacher)
    train = LatentCache(tmp_path / "latents").split("train")
    indices = torch.tensor([9, 0, 5, 0])  # over all three shards, one of them twice, in no order
    rows = [manifest.splits["train"][i] for i in indices.tolist()]
    squares = np.stack([fit(decode_image(manifest.path(row).read_bytes()), 64)[0] for row in rows])
    with torch.no_grad():
        mean, std = teacher.encode_images(torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 127.5 - 1)
        text = teacher.encode_prompts([row.captions[0] for row in rows])
    assert len(train) == N and train.latent_shape == (4, 8, 8) == mean.shape[1:]
    torch.testing.assert_close(train.sample(indices, None), mean, atol=1e-5, rtol=1e-4)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(train.sample(indices, torch.Generator().manual_seed(3)), mean + std * noise, atol=1e-5, rtol=1e-4)
    cond = train.conditioning(indices)
    torch.testing.assert_close(cond.prompt_embeds, text.prompt_embeds, atol=1e-5, rtol=1e-4)
    assert train.captions(indices) == [row.captions[0] for row in rows]
    if teacher.layout == "sdxl":
        torch.testing.assert_close(cond.pooled, text.pooled, atol=1e-5, rtol=1e-4)
        assert cond.time_ids.tolist() == [[64, 80, 0, 8, 64, 64]] * 4  # original (h, w), crop (top, left), target
    else:
        assert cond.pooled is None and cond.time_ids is None


def test_the_unconditional_half(tmp_path: Path, teacher: Teacher, manifest: Manifest) -> None:
    build_cache(tmp_path / "latents", manifest, config(), teacher)
    train = LatentCache(tmp_path / "latents").split("train")
    expected, found = teacher.unconditional(3), train.unconditional(3)
    torch.testing.assert_close(found.prompt_embeds, expected.prompt_embeds)
    if teacher.layout == "sdxl":
        torch.testing.assert_close(found.pooled, expected.pooled)
        torch.testing.assert_close(found.time_ids, expected.time_ids)
        own = train.conditioning(torch.arange(3)).time_ids
        assert train.unconditional(3, own).time_ids is own, "both halves must share the image's sizes"


def test_the_posterior_is_sampled_with_its_mean_and_std(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    build_cache(tmp_path / "latents", manifest, config(), sd15)
    train, indices = LatentCache(tmp_path / "latents").split("train"), torch.full((4000,), 6)
    draws = train.sample(indices, torch.Generator().manual_seed(0))
    row = manifest.splits["train"][6]
    image = torch.from_numpy(fit(decode_image(manifest.path(row).read_bytes()), 64)[0]).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        mean, std = (x[0] for x in sd15.encode_images(image))
    assert ((draws.mean(0) - mean).abs() < 5.5 * std / 4000**0.5).all()
    assert ((draws.std(0) / std - 1).abs() < 0.07).all()


def test_captions_are_deduplicated_and_drawn(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    counting = CountingTeacher(sd15)
    build_cache(tmp_path / "latents", manifest, config(), counting)
    cache = LatentCache(tmp_path / "latents")
    # ten of the train split, of which val repeats two, and the one that all share; one more call for the unconditional embedding
    assert len(cache.captions) == len(set(cache.captions)) == counting.prompts == N + 1
    train, indices = cache.split("train"), torch.full((400,), 7)
    drawn = train.captions(indices, torch.Generator().manual_seed(0))
    assert set(drawn) == {"picture 7", "a picture"} and 150 < drawn.count("a picture") < 250
    embeds = train.conditioning(indices[:8], torch.Generator().manual_seed(1)).prompt_embeds
    names = train.captions(indices[:8], torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(embeds, sd15.encode_prompts(names).prompt_embeds, atol=1e-5, rtol=1e-4)


def test_an_interrupted_build_goes_on_with_its_finished_shards(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    path = tmp_path / "latents"
    with pytest.raises(KeyboardInterrupt):
        build_cache(path, manifest, config(), CountingTeacher(sd15, stop_after=7))
    finished = path / "train-00000.safetensors"
    before = finished.stat()
    with pytest.raises(UserError, match="not there or not finished"):
        LatentCache(path)
    resumed = CountingTeacher(sd15)
    build_cache(path, manifest, config(), resumed)
    assert resumed.images == N + 2 - 4 and (finished.stat().st_ino, finished.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    build_cache(tmp_path / "whole", manifest, config(), sd15)
    assert LatentCache(path).key == LatentCache(tmp_path / "whole").key
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (path / file.name).read_bytes() == file.read_bytes(), file.name
    assert {p.name for p in path.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    again = CountingTeacher(sd15)
    build_cache(path, manifest, config(), again)
    assert (again.images, again.prompts) == (0, 0)


def test_a_stale_cache_is_refused_and_replaced(tmp_path: Path, sd15: Teacher, manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hypersd_pipeline")
    path = tmp_path / "latents"
    build_cache(path, manifest, config(), sd15)
    old = LatentCache(path)
    old.require_teacher(sd15)
    picture = manifest.path(manifest.splits["train"][9])
    Image.new("RGB", (70, 70), "green").save(picture)
    changed = read(manifest.root)
    with pytest.raises(UserError) as refusal:
        LatentCache(path, {"rows": changed.key})
    assert all(part in str(refusal.value) for part in ("the data set", changed.key[:16], manifest.key[:16], "run data_prep again"))
    counting = CountingTeacher(sd15)
    build_cache(path, changed, config(), counting)
    assert counting.images == 2 and counting.prompts == 0, "only the shard with the changed picture is made anew"
    assert "replacing a stale cache (changed: the data set)" in caplog.text
    assert LatentCache(path, {"rows": changed.key}).key != old.key
    with pytest.raises(UserError, match="the key is"):
        LatentCache(path, {"key": old.key})


def test_another_teacher_is_refused(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    build_cache(tmp_path / "latents", manifest, config(), sd15)
    folder = tiny.write_teacher(tmp_path / "other", "sd15", seed=1)
    other = load_teacher(TeacherConfig(source=str(folder)), ("vae", "text"), "cpu")
    with pytest.raises(UserError, match=r"the teacher's VAE has .*run data_prep again"):
        LatentCache(tmp_path / "latents").require_teacher(other)
    assert cache_parts(manifest, config(), other) != cache_parts(manifest, config(), sd15)


@pytest.mark.parametrize("extra", [{"dtype": "float16"}, {"text_dtype": "bfloat16"}, {"max_images": 3}, {"max_captions": 1}])
def test_every_setting_that_changes_the_content_changes_the_key(tmp_path: Path, sd15: Teacher, manifest: Manifest, extra: dict) -> None:
    path = tmp_path / "latents"
    build_cache(path, manifest, config(), sd15)
    key = LatentCache(path).key
    build_cache(path, manifest, config(**extra), sd15)
    cache = LatentCache(path)
    train = cache.split("train")
    assert cache.key != key and len(train) == extra.get("max_images", N)
    assert "a picture" not in cache.captions or "max_captions" not in extra
    assert train.sample(torch.tensor([0]), None).dtype == train.conditioning(torch.tensor([0])).prompt_embeds.dtype == torch.float32
    assert {p.name for p in path.glob("train-*")} == {f"train-{i:05d}.safetensors" for i in range((len(train) + 3) // 4)}


def test_damaged_files_are_named_and_mended(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    path = tmp_path / "latents"
    build_cache(path, manifest, config(), sd15)
    shard = path / "train-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"train-00001.safetensors is damaged .*run data_prep again"):
        LatentCache(path).split("train").sample(torch.tensor([5]), None)
    counting = CountingTeacher(sd15)
    build_cache(path, manifest, config(), counting)
    assert counting.images == 4 and shard.read_bytes() == whole
    shard.write_bytes((path / "train-00000.safetensors").read_bytes())
    with pytest.raises(UserError, match="does not belong to this cache"):
        LatentCache(path).split("train").sample(torch.tensor([5]), None)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00001.safetensors is missing"):
        LatentCache(path).split("train").sample(torch.tensor([5]), None)
    (path / "index.json").write_text(json.dumps({"key": "x"}))
    with pytest.raises(UserError, match="index is damaged"):
        LatentCache(path)
    build_cache(path, manifest, config(), sd15)
    assert len(LatentCache(path).split("train")) == N


def test_wrong_questions_are_refused(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    build_cache(tmp_path / "latents", manifest, config(), sd15)
    cache = LatentCache(tmp_path / "latents")
    with pytest.raises(UserError, match=r"no split 'test' but \['train', 'val'\]"):
        cache.split("test")
    for index in (-1, N):
        with pytest.raises(IndexError):
            cache.split("train").sample(torch.tensor([index]), None)


def test_a_picture_that_changed_after_validation_is_refused(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    manifest.path(manifest.splits["train"][2]).write_bytes(b"other")
    with pytest.raises(UserError, match=r"02.png has changed or gone since it was validated; run data_prep again"):
        build_cache(tmp_path / "latents", manifest, config(), sd15)
