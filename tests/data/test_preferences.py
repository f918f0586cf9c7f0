"""Preference pairs: made from scenes, read from a user's file, and their cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_pairs import SMALL, write_scenes, write_user_preferences

from hypersd_pipeline.data.images import decode_image, fit
from hypersd_pipeline.data.preferences import (
    CAPTION,
    CLEAN,
    SIMILAR,
    PairSet,
    Preference,
    PreferencesConfig,
    divide,
    pairs_from_manifest,
    read_preferences,
    read_preferences_cache,
    write_preferences_cache,
)
from hypersd_pipeline.data.rows import Manifest, share_of
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import tensors_sha256
from hypersd_pipeline.models.dual_encoder import DualEncoder, load_dual_encoder


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return load_dual_encoder()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def parts(manifest: Manifest, encoder: DualEncoder) -> dict[str, PairSet]:
    return pairs_from_manifest(manifest, encoder, SMALL)


@pytest.fixture(scope="module")
def pairs_folder(parts: dict[str, PairSet], encoder: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_preferences_cache(folder, parts, tensors_sha256(encoder.trained_tensors()))
    return folder


# --- pairs -------------------------------------------------------------------------------------------------------------------------------


def test_pairs_are_what_their_kind_says(parts: dict[str, PairSet], manifest: Manifest, encoder: DualEncoder) -> None:
    test = parts["test"]
    rows, n = manifest.splits["test"], 40
    assert test.kinds == (CLEAN, CAPTION, SIMILAR) and test.kind.bincount().tolist() == [n, n, n]
    clean = [decode_image(manifest.path(row).read_bytes()) for row in rows]
    pixels = torch.from_numpy(np.stack([fit(image, 64)[0] for image in clean])).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        features = encoder.image_features(pixels)
        unit = encoder.project_texts(encoder.text_features([row.captions[0] for row in rows]))
    assert torch.allclose(test.image[:n], features, atol=1e-4)
    degraded, wrong, similar = (test.pairs[test.kind == kind] for kind in range(3))
    for block in (degraded, wrong, similar):
        assert torch.equal(block[:, :2], torch.arange(n)[:, None].expand(n, 2))  # the winner: each image with its own caption
    assert torch.equal(degraded[:, 3], torch.arange(n)) and bool((test.image[degraded[:, 2]] != features).any(1).all())
    for block in (wrong, similar):
        assert torch.equal(block[:, 2], torch.arange(n))  # the same image
        assert all(rows[i].captions[0] != rows[j].captions[0] for i, j in block[:, [1, 3]].tolist())
    for i, j in similar[:, [1, 3]].tolist():
        better = sum(rows[k].captions[0] != rows[i].captions[0] and bool(unit[k] @ unit[i] > unit[j] @ unit[i] + 1e-6) for k in range(n))
        assert better < SMALL.neighbours


def test_no_image_is_in_two_parts(parts: dict[str, PairSet], manifest: Manifest) -> None:
    half = sum(share_of(row.image_id) < 0.5 for row in manifest.splits["train"])
    assert [len(parts[name]) for name in ("trained", "held_out", "test")] == [3 * half, 3 * (160 - half), 3 * 40]
    seen = [{tuple(row) for row in parts[name].image.tolist()} for name in ("trained", "held_out", "test")]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_pairs_are_the_same_every_time_and_another_seed_makes_others(
    parts: dict[str, PairSet], manifest: Manifest, encoder: DualEncoder
) -> None:
    small = PreferencesConfig(images=12, test_images=4, degraded=1)
    first, again, other = (
        pairs_from_manifest(manifest, encoder, config)["trained"] for config in (small, small, small.model_copy(update={"seed": 1}))
    )
    assert torch.equal(first.image, again.image) and torch.equal(first.pairs, again.pairs)
    assert not torch.equal(first.image, other.image)


def test_too_small_a_data_set_is_named(manifest: Manifest, encoder: DualEncoder) -> None:
    with pytest.raises(UserError, match="too few captions for the reward models' part 'test'"):
        pairs_from_manifest(Manifest(manifest.root, {"train": manifest.splits["train"][:12]}), encoder, SMALL)


def test_the_cache_returns_what_was_written_and_belongs_to_its_encoder(
    pairs_folder: Path, parts: dict[str, PairSet], encoder: DualEncoder, tmp_path: Path
) -> None:
    key = tensors_sha256(encoder.trained_tensors())
    read, content = read_preferences_cache(pairs_folder, "held_out", key)
    for name in ("image", "text", "pairs", "kind"):
        assert torch.equal(getattr(read, name), getattr(parts["held_out"], name))
    assert read.kinds == (CLEAN, CAPTION, SIMILAR) and content != read_preferences_cache(pairs_folder, "trained", key)[1]
    with pytest.raises(UserError, match="another dual encoder"):
        read_preferences_cache(pairs_folder, "test", "other")
    with pytest.raises(UserError, match="missing or damaged"):
        read_preferences_cache(tmp_path, "test", key)


# --- a user's file -----------------------------------------------------------------------------------------------------------------------


def test_bad_rows_are_reported_and_good_ones_go_on(tmp_path: Path, manifest: Manifest) -> None:
    file = write_user_preferences(tmp_path, manifest, 2)
    (tmp_path / "broken.png").write_bytes((tmp_path / "images/0.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    good = {"prompt": "a", "winner": "images/0.png", "loser": "images/1.png"}
    bad = [
        "{",
        "[1, 2]",
        json.dumps({**good, "prompt": " "}),
        json.dumps({"prompt": "a", "winner": "images/0.png"}),
        json.dumps({**good, "winner": 3}),
        json.dumps({**good, "loser": "gone.png"}),
        json.dumps({**good, "winner": "broken.png"}),
        json.dumps({**good, "loser": "text.png"}),
        json.dumps({**good, "loser": "images/0.png"}),
    ]
    file.write_text("\n".join([json.dumps(good), *bad, "", json.dumps({**good, "prompt": "b"})]))
    rows, table = read_preferences(file)
    assert [row.prompt for row in rows] == ["a", "b"] and rows[0].winner == tmp_path / "images/0.png"
    assert list(table.columns) == ["file", "row", "reason"] and set(table.file) == {"pairs.jsonl"}
    assert table.row.tolist() == [f"line {i}" for i in range(2, 11)]
    reasons = table.reason.tolist()
    assert reasons[:5] == ["the line is no JSON object"] * 2 + [
        "prompt is missing or empty",
        "loser is missing or empty",
        "winner is missing or empty",
    ]
    assert reasons[5] == "loser: the file is missing" and "winner: the image cannot be read" in reasons[6]
    assert "loser: the image cannot be read" in reasons[7] and reasons[8] == "winner and loser are the same image"
    file.write_text("\n".join(bad))
    with pytest.raises(UserError, match=r"no good row, 9 bad ones \(first: line 1: the line is no JSON object\)"):
        read_preferences(file)
    with pytest.raises(UserError, match="does not exist"):
        read_preferences(tmp_path / "gone.jsonl")


def test_a_users_prompts_are_in_one_part_each() -> None:
    rows = [Preference(f"prompt {i % 20}", Path(f"{i}.png"), Path("x.png")) for i in range(100)]
    made = divide(rows)
    prompts = {name: {row.prompt for row in part} for name, part in made.items()}
    assert sum(len(part) for part in made.values()) == 100
    assert [len(prompts[name]) for name in ("trained", "held_out", "test")] == [9, 9, 2]
    assert len(set.union(*prompts.values())) == 20
    assert [len(part) for part in divide(rows[:10]).values()] == [5, 4, 1]
    with pytest.raises(UserError, match="has 9 different prompts"):
        divide(rows[:9])
