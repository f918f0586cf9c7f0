"""The reward models' pairs, from scenes and from a user's file, and their training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kedro.config import OmegaConfigLoader
from PIL import Image
from torch import Tensor

from hypersd_pipeline.data.config import TwemojiSource
from hypersd_pipeline.data.images import decode_image, fit
from hypersd_pipeline.data.rows import Manifest, share_of
from hypersd_pipeline.data.twemoji import write_dataset
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.models.dual_encoder import DualEncoder, load_dual_encoder, tensors_hash
from hypersd_pipeline.pipelines.reward_models import create_pipeline, nodes
from hypersd_pipeline.pipelines.reward_models.config import PairsConfig, RewardTrainingConfig
from hypersd_pipeline.pipelines.reward_models.pairs import (
    CAPTION,
    CLEAN,
    SIMILAR,
    PairSet,
    Preference,
    divide,
    pairs_from_manifest,
    read_pairs,
    read_preferences,
    write_pairs,
)
from hypersd_pipeline.rewards.loading import load_reward
from hypersd_pipeline.rewards.text_image import TextImageConfig, TextImageHead, TextImageHeadConfig
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.loop import TrainingStopped

ROOT = Path(__file__).parents[2]
PAIRS = PairsConfig(images=160, test_images=40, degraded=1, wrong_captions=1, similar_captions=1, neighbours=5)
LOOP = {"steps": 60, "batch_size": 64, "learning_rate": 2e-3, "schedule": "cosine", "log_every": 10, "checkpoint_every": 20}


def training(**head: Any) -> RewardTrainingConfig:
    return RewardTrainingConfig(head=TextImageHeadConfig(**head), loop=LOOP)


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return load_dual_encoder()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("scenes")
    source = TwemojiSource(kind="twemoji", train=160, val=1, test=40, test_unseen=1)
    write_dataset(folder, config=source.scenes())
    return validate(source, folder)[0]


@pytest.fixture(scope="module")
def parts(manifest: Manifest, encoder: DualEncoder) -> dict[str, PairSet]:
    return pairs_from_manifest(manifest, encoder, PAIRS)


@pytest.fixture(scope="module")
def pairs_folder(parts: dict[str, PairSet], encoder: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder, parts, tensors_hash(encoder.trained_tensors()))
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
        assert torch.equal(block[:, :2], torch.arange(n)[:, None].expand(n, 2))  # the winner: each picture with its own caption
    assert torch.equal(degraded[:, 3], torch.arange(n)) and bool((test.image[degraded[:, 2]] != features).any(1).all())
    for block in (wrong, similar):
        assert torch.equal(block[:, 2], torch.arange(n))  # the same picture
        assert all(rows[i].captions[0] != rows[j].captions[0] for i, j in block[:, [1, 3]].tolist())
    for i, j in similar[:, [1, 3]].tolist():
        better = sum(rows[k].captions[0] != rows[i].captions[0] and bool(unit[k] @ unit[i] > unit[j] @ unit[i] + 1e-6) for k in range(n))
        assert better < PAIRS.neighbours


def test_no_picture_is_in_two_parts(parts: dict[str, PairSet], manifest: Manifest) -> None:
    half = sum(share_of(row.image_id) < 0.5 for row in manifest.splits["train"])
    assert [len(parts[name]) for name in ("trained", "held_out", "test")] == [3 * half, 3 * (160 - half), 3 * 40]
    seen = [{tuple(row) for row in parts[name].image.tolist()} for name in ("trained", "held_out", "test")]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_pairs_are_the_same_every_time_and_another_seed_makes_others(
    parts: dict[str, PairSet], manifest: Manifest, encoder: DualEncoder
) -> None:
    small = PairsConfig(images=12, test_images=4, degraded=1)
    first, again, other = (
        pairs_from_manifest(manifest, encoder, config)["trained"] for config in (small, small, small.model_copy(update={"seed": 1}))
    )
    assert torch.equal(first.image, again.image) and torch.equal(first.pairs, again.pairs)
    assert not torch.equal(first.image, other.image)


def test_too_small_a_data_set_is_named(manifest: Manifest, encoder: DualEncoder) -> None:
    with pytest.raises(UserError, match="too few captions for the reward models' part 'test'"):
        pairs_from_manifest(Manifest(manifest.root, {"train": manifest.splits["train"][:12]}), encoder, PAIRS)


def test_the_cache_returns_what_was_written_and_belongs_to_its_encoder(
    pairs_folder: Path, parts: dict[str, PairSet], encoder: DualEncoder, tmp_path: Path
) -> None:
    key = tensors_hash(encoder.trained_tensors())
    read, content = read_pairs(pairs_folder, "held_out", key)
    for name in ("image", "text", "pairs", "kind"):
        assert torch.equal(getattr(read, name), getattr(parts["held_out"], name))
    assert read.kinds == (CLEAN, CAPTION, SIMILAR) and content != read_pairs(pairs_folder, "trained", key)[1]
    with pytest.raises(UserError, match="another dual encoder"):
        read_pairs(pairs_folder, "test", "other")
    with pytest.raises(UserError, match="missing or damaged"):
        read_pairs(tmp_path, "test", key)


# --- a user's file -----------------------------------------------------------------------------------------------------------------------


def write_user_pairs(folder: Path, manifest: Manifest, n: int = 30) -> Path:
    """Clean scenes win against noise of the same size, a prompt each."""
    (folder / "pictures").mkdir()
    lines = []
    rng = np.random.default_rng(0)
    for i, row in enumerate(manifest.splits["train"][:n]):
        Image.open(manifest.path(row)).save(folder / "pictures" / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (80, 64, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i}_noise.png")
        lines.append(json.dumps({"prompt": f"{row.captions[0]} {i}", "winner": f"pictures/{i}.png", "loser": f"pictures/{i}_noise.png"}))
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_bad_rows_are_reported_and_good_ones_go_on(tmp_path: Path, manifest: Manifest) -> None:
    file = write_user_pairs(tmp_path, manifest, 2)
    (tmp_path / "broken.png").write_bytes((tmp_path / "pictures/0.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    good = {"prompt": "a", "winner": "pictures/0.png", "loser": "pictures/1.png"}
    bad = [
        "{",
        "[1, 2]",
        json.dumps({**good, "prompt": " "}),
        json.dumps({"prompt": "a", "winner": "pictures/0.png"}),
        json.dumps({**good, "winner": 3}),
        json.dumps({**good, "loser": "gone.png"}),
        json.dumps({**good, "winner": "broken.png"}),
        json.dumps({**good, "loser": "text.png"}),
        json.dumps({**good, "loser": "pictures/0.png"}),
    ]
    file.write_text("\n".join([json.dumps(good), *bad, "", json.dumps({**good, "prompt": "b"})]))
    rows, table = read_preferences(file)
    assert [row.prompt for row in rows] == ["a", "b"] and rows[0].winner == tmp_path / "pictures/0.png"
    assert list(table.columns) == ["file", "row", "reason"] and set(table.file) == {"pairs.jsonl"}
    assert table.row.tolist() == [f"line {i}" for i in range(2, 11)]
    reasons = table.reason.tolist()
    assert reasons[:5] == ["the line is no JSON object"] * 2 + [
        "prompt is missing or empty",
        "loser is missing or empty",
        "winner is missing or empty",
    ]
    assert reasons[5] == "loser: the file is missing" and "winner: the picture cannot be read" in reasons[6]
    assert "loser: the picture cannot be read" in reasons[7] and reasons[8] == "winner and loser are the same picture"
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


def test_a_users_pairs_train_a_reward(tmp_path: Path, manifest: Manifest, encoder: DualEncoder) -> None:
    file = write_user_pairs(tmp_path, manifest)
    with open(file, "a") as lines:
        lines.write("{}\n")
    write, rejected = nodes.make_pairs(manifest, PairsConfig(file=file))
    folder = tmp_path / "features"
    folder.mkdir()
    write(folder)
    assert rejected.values.tolist() == [["pairs.jsonl", "line 31", "prompt is missing or empty"]]
    _, report = nodes.train_text_image(folder, training(hidden=32), CheckpointStore(tmp_path / "checkpoints"), lambda m, s: None)
    assert report["pairs/preference"] == 3 and report["accuracy/preference"] == 1


# --- training ----------------------------------------------------------------------------------------------------------------------------


def test_the_loss_is_equation_9(parts: dict[str, PairSet], encoder: DualEncoder) -> None:
    config = RewardTrainingConfig(feature_dropout=0, loop={**LOOP, "batch_size": 8})
    torch.manual_seed(0)
    head, data = TextImageHead(config.head), parts["trained"]
    loss, scalars = nodes._Loss(head, encoder, data, config, "cpu")(torch.Generator().manual_seed(3))
    picked = data.pairs[torch.randint(len(data), (8,), generator=torch.Generator().manual_seed(3))]
    total, right = 0.0, 0
    for win_image, win_text, lose_image, lose_text in picked.tolist():

        def reward(image: int, text: int) -> Tensor:
            u = encoder.clip.visual.head(data.image[image][None])
            v = encoder.clip.text.proj(data.text[text][None])
            u, v = u / u.norm() * 16, v / v.norm() * 16  # the root of the 256 dimensions
            return head.layers(torch.cat([u * v, u, v], 1))[0, 0]

        difference = (reward(win_image, win_text) - reward(lose_image, lose_text)).item()
        total -= np.log(1 / (1 + np.exp(-difference))) / 8
        right += difference > 0
    assert loss.item() == pytest.approx(total, rel=1e-4) and float(scalars["accuracy"]) == pytest.approx(right / 8)


@pytest.mark.parametrize("role", ["trained", "held_out"])
def test_tiny_training_ranks_new_pairs_and_its_file_is_a_reward(
    role: str, pairs_folder: Path, parts: dict[str, PairSet], manifest: Manifest, tmp_path: Path
) -> None:
    node, config = {
        "trained": (nodes.train_text_image, training(hidden=64)),
        "held_out": (nodes.train_held_out, training(inputs="features", embed_dim=64, hidden=32, activation="silu")),
    }[role]
    seen: list[dict[str, float]] = []
    write, report = node(pairs_folder, config, CheckpointStore(tmp_path / "checkpoints"), lambda m, s: seen.append(m))
    assert seen[0]["loss"] > seen[-1]["loss"] and {"accuracy", "learning_rate"} <= set(seen[0])
    assert report[f"pairs/{CLEAN}"] == report[f"pairs/{CAPTION}"] == 40
    assert report[f"accuracy/{CLEAN}"] > 0.75  # 40 fair coins do so in 3 of 10000 cases
    if role == "trained":  # 80 pictures are too few for projections of the head's own
        assert report[f"accuracy/{CAPTION}"] > 0.9

    write(tmp_path)
    reward: Any = load_reward(TextImageConfig(weights=tmp_path / "reward.safetensors"), to_train_on=False)
    assert reward.role == role
    rows = manifest.splits["test"][:20]
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(manifest.path(row)))).permute(2, 0, 1) for row in rows]).float() / 255
    with torch.no_grad():
        own = reward.score(pictures, [row.captions[0] for row in rows])
        broken = reward.score((pictures + 0.15 * torch.randn(pictures.shape)).clamp(0, 1), [row.captions[0] for row in rows])
        winners = nodes._winners(reward.head, reward.encoder, parts["test"])
    assert float((own > broken).float().mean()) > 0.7
    assert len(winners) == 40 and float(winners.mean()) == pytest.approx(0, abs=1e-3) and float(winners.std()) == pytest.approx(1, rel=1e-3)


def test_an_interrupted_training_continues_bit_for_bit(pairs_folder: Path, tmp_path: Path) -> None:
    config = training(hidden=16)
    straight, _ = nodes.train_text_image(pairs_folder, config, CheckpointStore(tmp_path / "a"), lambda m, s: None)
    store = CheckpointStore(tmp_path / "b")

    def stop(metrics: dict[str, float], step: int) -> None:
        if step == 30:
            raise TrainingStopped("enough")

    with pytest.raises(TrainingStopped):
        nodes.train_text_image(pairs_folder, config, store, stop)
    steps: list[int] = []
    resumed, _ = nodes.train_text_image(pairs_folder, config, store, lambda m, step: steps.append(step))
    assert steps[0] == 30  # from the checkpoint of step 20 on
    for writer, name in ((straight, "x"), (resumed, "y")):
        (tmp_path / name).mkdir()
        writer(tmp_path / name)
    a, b = (load_reward(TextImageConfig(weights=tmp_path / name / "reward.safetensors")) for name in "xy")
    assert isinstance(a, torch.nn.Module) and isinstance(b, torch.nn.Module)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_head_that_does_not_fit_the_encoder_is_named(pairs_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.head\.embed_dim: is 64, the dual encoder's embeddings have 256"):
        nodes.train_text_image(pairs_folder, training(embed_dim=64), CheckpointStore(tmp_path), lambda m, s: None)


# --- wiring ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["base", "smoke"])
def test_configuration_is_valid_and_both_rewards_differ(env: str) -> None:
    values = OmegaConfigLoader(str(ROOT / "conf"), env=env, **{**CONFIG_LOADER_ARGS, "default_run_env": env})["parameters"]
    PairsConfig(**values["reward_pairs"])
    trained, held_out = (RewardTrainingConfig(**values[f"reward_{name}"]["training"]) for name in ("text_image", "held_out"))
    assert trained.head != held_out.head and trained.loop.seed != held_out.loop.seed
    assert TextImageConfig().weights.parent == Path("data/06_models/text_image_reward")


def test_pipeline_reads_the_manifest_and_writes_both_rewards() -> None:
    pipeline = create_pipeline()
    handles = {f"reward_{name}.{handle}" for name in ("text_image", "held_out") for handle in ("checkpoints", "metric_stream")}
    parameters = {"params:reward_pairs", "params:reward_text_image.training", "params:reward_held_out.training"}
    assert pipeline.inputs() == {"manifest"} | handles | parameters
    assert pipeline.outputs() == {
        "rejected_pairs",
        *(f"{name}_reward" for name in ("text_image", "held_out")),
        *(f"report_reward_{name}" for name in ("text_image", "held_out")),
    }
