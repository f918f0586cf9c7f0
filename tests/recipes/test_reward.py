"""The rewards' training on preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from preference_pairs import SMALL, write_scenes, write_user_preferences
from torch import Tensor

from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.data.preferences import (
    CAPTION,
    CLEAN,
    PairSet,
    PreferencesConfig,
    make_preferences,
    pairs_from_manifest,
    write_preferences_cache,
)
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import tensors_sha256
from hypersd_pipeline.models.dual_encoder import DualEncoder, load_dual_encoder
from hypersd_pipeline.pipelines.reward_models import create_pipeline
from hypersd_pipeline.recipes import reward
from hypersd_pipeline.recipes.reward import RewardTrainingConfig, train_held_out, train_text_image
from hypersd_pipeline.rewards.loading import load_reward
from hypersd_pipeline.rewards.text_image import TextImageConfig, TextImageHead, TextImageHeadConfig
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.loop import TrainingStopped

ROOT = Path(__file__).parents[2]
LOOP = {"steps": 60, "batch_size": 64, "learning_rate": 2e-3, "schedule": "cosine", "log_every": 10, "checkpoint_every": 20}


def training(**head: Any) -> RewardTrainingConfig:
    return RewardTrainingConfig(head=TextImageHeadConfig(**head), loop=LOOP)


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


# --- training ----------------------------------------------------------------------------------------------------------------------------


def test_the_loss_is_equation_9(parts: dict[str, PairSet], encoder: DualEncoder) -> None:
    config = RewardTrainingConfig(feature_dropout=0, loop={**LOOP, "batch_size": 8})
    torch.manual_seed(0)
    head, data = TextImageHead(config.head), parts["trained"]
    loss, scalars = reward._Loss(head, encoder, data, config, "cpu")(torch.Generator().manual_seed(3))
    picked = data.pairs[torch.randint(len(data), (8,), generator=torch.Generator().manual_seed(3))]
    total, right = 0.0, 0
    for win_image, win_text, lose_image, lose_text in picked.tolist():

        def score(image: int, text: int) -> Tensor:
            u = encoder.clip.visual.head(data.image[image][None])
            v = encoder.clip.text.proj(data.text[text][None])
            u, v = u / u.norm() * 16, v / v.norm() * 16  # the root of the 256 dimensions
            return head.layers(torch.cat([u * v, u, v], 1))[0, 0]

        difference = (score(win_image, win_text) - score(lose_image, lose_text)).item()
        total -= np.log(1 / (1 + np.exp(-difference))) / 8
        right += difference > 0
    assert loss.item() == pytest.approx(total, rel=1e-4) and float(scalars["accuracy"]) == pytest.approx(right / 8)


@pytest.mark.parametrize("role", ["trained", "held_out"])
def test_tiny_training_ranks_new_pairs_and_its_file_is_a_reward(
    role: str, pairs_folder: Path, parts: dict[str, PairSet], manifest: Manifest, tmp_path: Path
) -> None:
    node, config = {
        "trained": (train_text_image, training(hidden=64)),
        "held_out": (train_held_out, training(inputs="features", embed_dim=64, hidden=32, activation="silu")),
    }[role]
    seen: list[dict[str, float]] = []
    write, report = node(pairs_folder, config, CheckpointStore(tmp_path / "checkpoints"), lambda m, s: seen.append(m))
    assert seen[0]["loss"] > seen[-1]["loss"] and {"accuracy", "learning_rate"} <= set(seen[0])
    assert report[f"pairs/{CLEAN}"] == report[f"pairs/{CAPTION}"] == 40
    assert report[f"accuracy/{CLEAN}"] > 0.75  # 40 fair coins do so in 3 of 10000 cases
    if role == "trained":  # 80 images are too few for projections of the head's own
        assert report[f"accuracy/{CAPTION}"] > 0.9

    write(tmp_path)
    judge: Any = load_reward(TextImageConfig(weights=tmp_path / "reward.safetensors"), to_train_on=False)
    assert judge.role == role
    rows = manifest.splits["test"][:20]
    images = torch.stack([torch.from_numpy(np.array(Image.open(manifest.path(row)))).permute(2, 0, 1) for row in rows]).float() / 255
    with torch.no_grad():
        own = judge.score(images, [row.captions[0] for row in rows])
        broken = judge.score((images + 0.15 * torch.randn(images.shape)).clamp(0, 1), [row.captions[0] for row in rows])
        winners = reward._winners(judge.head, judge.encoder, parts["test"])
    assert float((own > broken).float().mean()) > 0.7
    assert len(winners) == 40 and float(winners.mean()) == pytest.approx(0, abs=1e-3) and float(winners.std()) == pytest.approx(1, rel=1e-3)


def test_an_interrupted_training_continues_bit_for_bit(pairs_folder: Path, tmp_path: Path) -> None:
    config = training(hidden=16)
    straight, _ = train_text_image(pairs_folder, config, CheckpointStore(tmp_path / "a"), lambda m, s: None)
    store = CheckpointStore(tmp_path / "b")

    def stop(metrics: dict[str, float], step: int) -> None:
        if step == 30:
            raise TrainingStopped("enough")

    with pytest.raises(TrainingStopped):
        train_text_image(pairs_folder, config, store, stop)
    steps: list[int] = []
    resumed, _ = train_text_image(pairs_folder, config, store, lambda m, step: steps.append(step))
    assert steps[0] == 30  # from the checkpoint of step 20 on
    for writer, name in ((straight, "x"), (resumed, "y")):
        (tmp_path / name).mkdir()
        writer(tmp_path / name)
    a, b = (load_reward(TextImageConfig(weights=tmp_path / name / "reward.safetensors")) for name in "xy")
    assert isinstance(a, torch.nn.Module) and isinstance(b, torch.nn.Module)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_head_that_does_not_fit_the_encoder_is_named(pairs_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.head\.embed_dim: is 64, the dual encoder's embeddings have 256"):
        train_text_image(pairs_folder, training(embed_dim=64), CheckpointStore(tmp_path), lambda m, s: None)


def test_a_users_pairs_train_a_reward(tmp_path: Path, manifest: Manifest, encoder: DualEncoder) -> None:
    file = write_user_preferences(tmp_path, manifest)
    with open(file, "a") as lines:
        lines.write("{}\n")
    write, rejected = make_preferences(manifest, PreferencesConfig(file=file))
    folder = tmp_path / "features"
    folder.mkdir()
    write(folder)
    assert rejected.values.tolist() == [["pairs.jsonl", "line 31", "prompt is missing or empty"]]
    _, report = train_text_image(folder, training(hidden=32), CheckpointStore(tmp_path / "checkpoints"), lambda m, s: None)
    assert report["pairs/preference"] == 3 and report["accuracy/preference"] == 1


# --- wiring ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["base", "smoke"])
def test_configuration_is_valid_and_both_rewards_differ(env: str) -> None:
    values = ProjectConfigLoader(str(ROOT / "conf"), env=env, **{**CONFIG_LOADER_ARGS, "default_run_env": env})["parameters"]
    PreferencesConfig(**values["reward_pairs"])
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
