"""The latent cache on tiny random teachers of both layouts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from PIL import Image
from ranks import on_ranks

from hypersd_pipeline.data.cache import LatentCache, read_shard
from hypersd_pipeline.data.cache_build import build_cache, cache_parts, fill_cache
from hypersd_pipeline.data.config import DataConfig, FolderSource
from hypersd_pipeline.data.images import decode_image, fit
from hypersd_pipeline.data.probe import PROMPTS, probe
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.teacher import Teacher, TeacherConfig, load_teacher
from hypersd_pipeline.training import distributed

N = 10  # training images: three shards of four, four and two rows


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tiny.write_teacher(tmp_path_factory.mktemp(request.param), request.param)
    return load_teacher(TeacherConfig(source=str(folder)), ("vae", "text"), "cpu")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tiny.write_teacher(tmp_path_factory.mktemp("sd15"), "sd15")
    return load_teacher(TeacherConfig(source=str(folder)), ("vae", "text"), "cpu")


def images(root: Path, train: int = N) -> Path:
    """Images of 80 x 64 with two captions each. All share one of them."""
    for split, count in (("train", train), ("val", 2)):
        (root / split).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([i, count]).integers(0, 256, (64, 80, 3), np.uint8)
            Image.fromarray(pixels).save(root / split / f"{i:02d}.png")
            (root / split / f"{i:02d}.txt").write_text(f"image {i}\na photo\n")
    return root


def read(root: Path) -> Manifest:
    return validate(FolderSource(kind="folder", root=str(root)), Path("unused"))[0]


def config(**extra) -> DataConfig:
    return DataConfig(source={"kind": "folder", "root": "unused"}, **{"shard_rows": 4, "batch_size": 3, "workers": 2, **extra})


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return read(images(tmp_path / "images"))


class CountingTeacher:
    """A real teacher that counts what it encodes beside the probe and, if asked, is interrupted."""

    def __init__(self, teacher: Teacher, stop_after: int | None = None) -> None:
        self._teacher, self.images, self.prompts, self._stop_after = teacher, -1, -len(PROMPTS), stop_after

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


def values(cache: LatentCache, manifest: Manifest) -> dict[tuple[str, ...], list[torch.Tensor]]:
    """What the cache gives for each image with its captions."""
    found = {}
    for name, rows in manifest.splits.items():
        split = cache.split(name)
        for i, row in enumerate(rows):
            at = torch.tensor([i])
            draw = split.sample(at, torch.Generator().manual_seed(0))
            found[(row.sha256, *row.captions)] = [split.sample(at, None), draw, split.conditioning(at).prompt_embeds]
    return found


def assert_same(one: LatentCache, other: LatentCache) -> None:
    assert one.captions == other.captions and one.splits == other.splits
    for name in one.splits:
        at = torch.arange(len(one.split(name)))
        a, b = (cache.split(name).sample(at, torch.Generator().manual_seed(1)) for cache in (one, other))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert torch.equal(*(cache.split(name).caption_numbers(at, torch.Generator().manual_seed(2)) for cache in (one, other)))


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
        assert cond.sizes.tolist() == [[64, 64, 0, 0, 64, 64]] * 4  # those with which users sample
    else:
        assert cond.pooled is None and cond.sizes is None


def test_sizes_of_the_images_themselves(tmp_path: Path, teacher: Teacher, manifest: Manifest) -> None:
    """``sizes: image`` gives each row its size and crop. To switch costs no row, and SD1.5's cache does not depend on it."""
    keys = []
    for choice, sizes in (("default", [64, 64, 0, 0, 64, 64]), ("image", [64, 80, 0, 8, 64, 64])):  # original (h, w), crop, target
        build_cache(tmp_path / "latents", manifest, config(sizes=choice), teacher)
        cache = LatentCache(tmp_path / "latents")
        keys.append((cache.key, cache.index["splits"]))
        cond = cache.split("train").conditioning(torch.arange(2))
        assert (cond.sizes is None) == (teacher.layout == "sd15")
        assert cond.sizes is None or cond.sizes.tolist() == [sizes] * 2
    assert (keys[0][0] == keys[1][0]) == (teacher.layout == "sd15") and keys[0][1] == keys[1][1]


def test_the_unconditional_half(tmp_path: Path, teacher: Teacher, manifest: Manifest) -> None:
    build_cache(tmp_path / "latents", manifest, config(), teacher)
    train = LatentCache(tmp_path / "latents").split("train")
    expected, found = teacher.unconditional(3), train.unconditional(3)
    torch.testing.assert_close(found.prompt_embeds, expected.prompt_embeds)
    if teacher.layout == "sdxl":
        torch.testing.assert_close(found.pooled, expected.pooled)
        torch.testing.assert_close(found.sizes, expected.sizes)
        own = train.conditioning(torch.arange(3)).sizes
        assert train.unconditional(3, own).sizes is own, "both halves must share the image's sizes"


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
    # ten of the train split, of which val repeats two, and the one that all share. One more call for the unconditional embedding
    assert len(cache.captions) == len(set(cache.captions)) == counting.prompts == N + 1
    train, indices = cache.split("train"), torch.full((400,), 7)
    drawn = train.captions(indices, torch.Generator().manual_seed(0))
    assert set(drawn) == {"image 7", "a photo"} and 150 < drawn.count("a photo") < 250
    embeds = train.conditioning(indices[:8], torch.Generator().manual_seed(1)).prompt_embeds
    names = train.captions(indices[:8], torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(embeds, sd15.encode_prompts(names).prompt_embeds, atol=1e-5, rtol=1e-4)


def test_an_interrupted_build_goes_on_with_its_finished_shards(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    path = tmp_path / "latents"
    with pytest.raises(KeyboardInterrupt):
        build_cache(path, manifest, config(), CountingTeacher(sd15, stop_after=7))
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.glob("train-*")}
    finished = sum(len(read_shard(file)[0].rows) for file in before)
    assert before and 5 <= finished <= 9
    with pytest.raises(UserError, match="not there or not finished"):
        LatentCache(path)
    resumed = CountingTeacher(sd15)
    build_cache(path, manifest, config(), resumed)
    assert resumed.images == N + 2 - finished
    assert all((file.stat().st_ino, file.stat().st_mtime_ns) == old for file, old in before.items())
    build_cache(tmp_path / "whole", manifest, config(), sd15)
    assert LatentCache(path).key == LatentCache(tmp_path / "whole").key
    assert {p.name for p in path.iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert_same(LatentCache(path), LatentCache(tmp_path / "whole"))
    again = CountingTeacher(sd15)
    build_cache(path, manifest, config(), again)
    assert (again.images, again.prompts) == (0, 0)


def bytes_in(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_several_processes_write_the_same_bytes_as_one(tmp_path: Path, sd15: Teacher) -> None:
    """Batches of 3 over shards of 1 to 4 rows: almost every process begins and ends within a batch of the plan."""
    manifest = read(images(tmp_path / "images", train=24))
    shutil.copy(manifest.path(manifest.splits["train"][5]), manifest.root / "val/00.png")  # a copy in another split
    manifest = read(manifest.root)
    build_cache(tmp_path / "1", manifest, config(), sd15)
    expected = bytes_in(tmp_path / "1")

    def fill(path: Path) -> dict[str, int]:
        counting = CountingTeacher(sd15)
        fill_cache(path, manifest, config(), counting, distributed.rank(), distributed.ranks(), distributed.wait)
        return {"images": counting.images, "prompts": counting.prompts}

    for count in (2, 4):
        path, encoded = tmp_path / str(count), []
        build_cache(path, manifest, config(), sd15, lambda: encoded.extend(on_ranks(count, tmp_path / f"ranks{count}", lambda: fill(path))))  # noqa: B023
        assert bytes_in(path) == expected
        images_each, prompts_each = ([each[part] for each in encoded] for part in ("images", "prompts"))
        assert len(encoded) == count and 26 <= sum(images_each) <= 26 + 2 * 3 * count and max(images_each) <= 26 / count + 3 + 2 * 3
        assert 0 < min(prompts_each) and sum(prompts_each) >= len(LatentCache(path).captions)


def test_what_other_processes_left_out_or_damaged_is_made_in_the_end(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    build_cache(tmp_path / "whole", manifest, config(), sd15)
    path = tmp_path / "latents"
    build_cache(path, manifest, config(), sd15)
    damaged, _ = shard_of(path, 0)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    (path / "index.json").unlink()
    seen = []

    def others() -> None:
        assert not damaged.exists(), "the others would take it for whole"
        fill_cache(path, manifest, config(), sd15, 0, 1)
        seen.append(damaged.exists())
        (path / shard_of(tmp_path / "whole", N - 1)[0].name).unlink()  # one of them died

    counting = CountingTeacher(sd15)
    build_cache(path, manifest, config(), counting, others)
    assert seen == [True] and counting.images == shard_of(path, N - 1)[1]
    assert_same(LatentCache(path), LatentCache(tmp_path / "whole"))
    build_cache(path, manifest, config(), sd15, lambda: pytest.fail("nothing is missing"))


def test_a_stale_cache_is_refused_and_replaced(tmp_path: Path, sd15: Teacher, manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hypersd_pipeline")
    path = tmp_path / "latents"
    build_cache(path, manifest, config(), sd15)
    old = LatentCache(path)
    old.require_teacher(sd15)
    image = manifest.path(manifest.splits["train"][9])
    Image.new("RGB", (70, 70), "green").save(image)
    changed = read(manifest.root)
    with pytest.raises(UserError) as refusal:
        LatentCache(path, {"rows": changed.key})
    assert all(part in str(refusal.value) for part in ("the data set", changed.key[:16], manifest.key[:16], "run data_prep again"))
    counting = CountingTeacher(sd15)
    build_cache(path, changed, config(), counting)
    assert counting.images == 1 and counting.prompts == 0, "only the changed image is encoded"
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
    assert "a photo" not in cache.captions or "max_captions" not in extra
    assert train.sample(torch.tensor([0]), None).dtype == train.conditioning(torch.tensor([0])).prompt_embeds.dtype == torch.float32
    shards = [read_shard(file)[0] for file in path.glob("train-*")]
    assert sum(len(shard.rows) for shard in shards) == len(train) and all(len(shard.rows) <= 4 for shard in shards)


def shard_of(path: Path, row: int) -> tuple[Path, int]:
    """The file that holds a row of the split ``train``, and how many rows it has."""
    start = 0
    for entry in LatentCache(path).index["splits"]["train"]:
        if row < start + entry["rows"]:
            return path / entry["file"], entry["rows"]
        start += entry["rows"]
    raise AssertionError("no such row")


def test_damaged_files_are_named_and_mended(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    path = tmp_path / "latents"
    build_cache(path, manifest, config(), sd15)
    (shard, rows), (other, _) = shard_of(path, 5), shard_of(path, 0)
    assert shard != other
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[-50] ^= 4
    for content in (whole[:-100], bytes(flipped), b"", whole.replace(b"sha256", b"sha255")):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"{shard.name} is damaged .*run data_prep again"):
            LatentCache(path).split("train").sample(torch.tensor([5]), None)
        counting = CountingTeacher(sd15)
        build_cache(path, manifest, config(), counting)
        assert counting.images == rows and len(read_shard(shard)[0].rows) == rows
        assert LatentCache(path).split("train").sample(torch.arange(N), None).isfinite().all()
    shard.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match="does not belong to this cache"):
        LatentCache(path).split("train").sample(torch.tensor([5]), None)
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} is missing"):
        LatentCache(path).split("train").sample(torch.tensor([5]), None)
    for name in ("index.json", "captions.json", "rows.safetensors", "unconditional.safetensors", "encoders.json"):
        (path / name).write_text(json.dumps({"key": "x"}))
        build_cache(path, manifest, config(), sd15)
        assert len(LatentCache(path).split("train")) == N and LatentCache(path).unconditional(1) is not None
    for content in ("", "[]", '{"key": 1, "parts": {}, "splits": 5}', "[" * 100_000, "\x00"):
        (path / "index.json").write_text(content)
        with pytest.raises(UserError, match="run data_prep again"):
            LatentCache(path)


@pytest.mark.parametrize("name", ["0_first", "zz_last", "04_and_a_half"])
def test_one_more_image_costs_one(tmp_path: Path, sd15: Teacher, manifest: Manifest, name: str) -> None:
    path = tmp_path / "latents"
    build_cache(path, manifest, config(), sd15)
    old = values(LatentCache(path), manifest)
    Image.new("RGB", (70, 70), "green").save(manifest.root / f"train/{name}.png")
    (manifest.root / f"train/{name}.txt").write_text("a green square")
    more, counting = read(manifest.root), CountingTeacher(sd15)
    build_cache(path, more, config(), counting)
    assert (counting.images, counting.prompts) == (1, 1)
    assert len(LatentCache(path).split("train")) == N + 1
    new = values(LatentCache(path), more)
    assert all(torch.equal(a, b) for key in old for a, b in zip(old[key], new[key], strict=True)), "a copied row has other bits"
    build_cache(path, manifest, config(), CountingTeacher(sd15, stop_after=0))  # and back again: nothing to encode
    assert values(LatentCache(path), manifest).keys() == old.keys()


def test_a_corrected_caption_and_a_moved_image_cost_no_image(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    path = tmp_path / "latents"
    build_cache(path, manifest, config(), sd15)
    old = values(LatentCache(path), manifest)
    (manifest.root / "train/03.txt").write_text("a better caption\na photo\n")
    (manifest.root / "train/00.png").rename(manifest.root / "val/zz.png")
    (manifest.root / "train/00.txt").rename(manifest.root / "val/zz.txt")
    corrected, counting = read(manifest.root), CountingTeacher(sd15)
    build_cache(path, corrected, config(), counting)
    assert (counting.images, counting.prompts) == (0, 1)
    cache = LatentCache(path)
    assert cache.split("train").captions(torch.tensor([2])) == ["a better caption"] and len(cache.split("val")) == 3
    new = values(cache, corrected)
    same = [key for key in old if key in new]
    assert len(same) == N + 2 - 1, "all rows but the one with another caption"
    assert all(torch.equal(a, b) for key in same for a, b in zip(old[key], new[key], strict=True))


def test_another_size_of_shards_copies_all(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    path = tmp_path / "latents"
    build_cache(path, manifest, config(), sd15)
    (path / "index.json").unlink()
    counting = CountingTeacher(sd15)
    build_cache(path, manifest, config(shard_rows=3), counting)
    assert (counting.images, counting.prompts) == (0, 0)


class Killed(BaseException):
    """Nothing in the package catches it."""


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_a_kill_at_any_moment_leaves_what_the_next_run_completes(
    tmp_path: Path, sd15: Teacher, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, when: str, expected: LatentCache
) -> None:
    """The build is stopped before, in or after each of its calls that change the folder. Before it the folder holds an older cache."""
    few = Manifest(manifest.root, {"train": manifest.splits["train"][:4], "val": manifest.splits["val"]})
    build_cache(tmp_path / "older", few, config(), sd15)
    for step in range(1000):
        path = tmp_path / "latents"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "older", path)
        calls = iter(range(1000))

        def killing(original, calls=calls, step=step, write=None):
            def call(*args, **kwargs):
                at = next(calls)
                if at >= step and when != "after":  # what runs in a finally clause is killed, too
                    if write and when == "half":
                        Path(args[1]).write_bytes(b"cut off")
                    raise Killed
                result = original(*args, **kwargs)
                if at >= step:
                    raise Killed
                return result

            return call

        killed = False
        with monkeypatch.context() as patch:
            patch.setattr("safetensors.torch.save_file", killing(safetensors.torch.save_file, write=True))
            patch.setattr("os.replace", killing(os.replace))
            patch.setattr("pathlib.Path.unlink", killing(Path.unlink))
            try:
                build_cache(path, manifest, config(), sd15)
            except Killed:
                killed = True
        if not killed:
            assert step > 25
            break
        with contextlib.suppress(UserError):
            LatentCache(path, {"rows": manifest.key}).split("train").sample(torch.arange(N), None)
        counting = CountingTeacher(sd15)
        build_cache(path, manifest, config(), counting)
        assert counting.images <= N + 2 - 4 - 2, "rows of the older cache are not encoded again"
        assert_same(LatentCache(path, {"rows": manifest.key}), expected)
        assert {file.name for file in path.iterdir()} == {file.name for file in expected.path.iterdir()}, step


def test_what_a_killed_process_left_is_removed(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    path = tmp_path / "latents"
    build_cache(path, manifest, config(), sd15)
    names = {file.name for file in path.iterdir()}
    (path / ".train-0.safetensors.99999999.tmp").write_bytes(b"cut off")
    (path / "train-0.safetensors").write_bytes(b"of an older cache")
    build_cache(path, manifest, config(), sd15)
    assert {file.name for file in path.iterdir()} == names


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, sd15: Teacher) -> LatentCache:
    folder = tmp_path_factory.mktemp("expected")
    build_cache(folder / "latents", read(images(folder / "images")), config(), sd15)
    return LatentCache(folder / "latents")


def test_an_encoder_that_is_not_whole_gives_another_key(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    path = tmp_path / "latents"
    build_cache(path, manifest, config(), sd15)
    key = LatentCache(path).key
    folder = tiny.write_teacher(tmp_path / "teacher", "sd15")
    for part in ("vae", "text"):
        half = load_teacher(TeacherConfig(source=str(folder)), ("vae", "text"), "cpu")
        module = half.vae.encoder if part == "vae" else half.text_encoders[0]
        with torch.no_grad():
            parameter = next(p for name, p in module.named_parameters() if p.ndim > 1 and "embed" not in name)
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * parameter.std())
        assert half.content_hash(part) == sd15.content_hash(part), "the files do not show it"
        counting = CountingTeacher(half)
        build_cache(path, manifest, config(), counting)
        assert (counting.images > 0, counting.prompts > 0) == (part == "vae", part == "text")
        assert LatentCache(path).key != key
        build_cache(path, manifest, config(), sd15)
        assert LatentCache(path).key == key


def test_the_noise_of_another_processor_keeps_the_key(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    build_cache(tmp_path / "latents", manifest, config(), sd15)
    file = tmp_path / "latents/encoders.json"
    content = json.loads(file.read_text())
    hashes = probe(sd15)
    for part in content.values():
        part["numbers"] = [number + 0.004 for number in part["numbers"]]
        part["hash"] = "made elsewhere"
    file.write_text(json.dumps(content))
    assert set(probe(sd15, tmp_path / "latents").values()) == {"made elsewhere"} and probe(sd15) == hashes
    assert json.loads(file.read_text())["vae"]["hash"] == "made elsewhere"
    noisy = load_teacher(TeacherConfig(source=str(sd15.folder)), ("vae", "text"), "cpu")
    with torch.no_grad():
        for parameter in (*noisy.vae.parameters(), *noisy.text_encoders[0].parameters()):
            parameter.mul_(1 + 1e-6 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert probe(noisy) == hashes


def test_encoders_that_give_nonsense_are_refused(tmp_path: Path, manifest: Manifest) -> None:
    folder = tiny.write_teacher(tmp_path / "teacher", "sd15")
    for part, message in (("vae", "VAE gives numbers that are not finite"), ("text", "text encoder gives numbers that are not finite")):
        broken = load_teacher(TeacherConfig(source=str(folder)), ("vae", "text"), "cpu")
        with torch.no_grad():
            next((broken.vae if part == "vae" else broken.text_encoders[0]).parameters()).fill_(torch.nan)
        with pytest.raises(UserError, match=message):
            build_cache(tmp_path / "latents", manifest, config(), broken)
    constant = load_teacher(TeacherConfig(source=str(folder)), ("vae", "text"), "cpu")
    with torch.no_grad():
        for parameter in constant.text_encoders[0].parameters():
            parameter.zero_()
    with pytest.raises(UserError, match="the same embedding for every prompt"):
        build_cache(tmp_path / "latents", manifest, config(), constant)


def test_a_cache_of_another_version_is_said_and_replaced(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    path = tmp_path / "latents"
    path.mkdir()
    (path / "captions.json").write_text("[]")
    (path / "index.json").write_text(
        json.dumps({"key": "k", "parts": {"format": "2"}, "splits": {}, "text": [], "latent_shape": [4, 8, 8]})
    )
    safetensors.torch.save_file({"mean": torch.zeros(4)}, path / "train-00000.safetensors", {"key": "old"})
    with pytest.raises(UserError, match=r"another version of this project; run data_prep again"):
        LatentCache(path)
    build_cache(path, manifest, config(), sd15)
    assert not (path / "train-00000.safetensors").exists() and len(LatentCache(path).split("train")) == N


def test_wrong_questions_are_refused(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    build_cache(tmp_path / "latents", manifest, config(), sd15)
    cache = LatentCache(tmp_path / "latents")
    with pytest.raises(UserError, match=r"no split 'test' but \['train', 'val'\]"):
        cache.split("test")
    for index in (-1, N):
        with pytest.raises(IndexError):
            cache.split("train").sample(torch.tensor([index]), None)


def test_a_image_that_changed_after_validation_is_refused(tmp_path: Path, sd15: Teacher, manifest: Manifest) -> None:
    manifest.path(manifest.splits["train"][2]).write_bytes(b"other")
    with pytest.raises(UserError, match=r"02.png has changed or gone since it was validated; run data_prep again"):
        build_cache(tmp_path / "latents", manifest, config(), sd15)
