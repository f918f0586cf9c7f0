"""A retraining with a real registry: first champion, new rows, promotion, rollback, and what must not happen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from servers import Server

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.io.registry import ModelRegistry, RegistryDataset
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import LoRA, lora_key
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.recipes.feedback import AnnotatedData
from hypersd_pipeline.recipes.prepare import cache_latents, generate_dataset, validate_rows
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.retraining import run
from hypersd_pipeline.retraining.config import RetrainConfig
from hypersd_pipeline.retraining.gate import Decision
from hypersd_pipeline.retraining.measure import check_weights, sample_in_diffusers
from hypersd_pipeline.retraining.run import Retraining, watch
from hypersd_pipeline.training.checkpoints import CheckpointStore

ASSETS = Path(__file__).parents[2] / "src/hypersd_pipeline/assets"
LORA = {"rank": 2, "target_modules": ("to_q", "to_v")}
EVALUATION = EvaluationConfig(samples=8, unseen_samples=4, batch_size=8, bootstrap=100, grid_prompts=1)


def stage(segments: int) -> dict[str, object]:
    terms = {"consistency": {"segments": segments, "guidance": (3.0, 5.0)}}
    return {"terms": terms, "lora": LORA, "loop": {"steps": 2, "batch_size": 2, "learning_rate": 0.01}}


CONFIG = RetrainConfig(
    scratch={"k2": stage(2)},
    champion={"k1": stage(1)},
    judges={
        "sample": {"steps": 2, "gradient_steps": 1},
        "terms": {
            "quality": {"kind": "reward", "reward": {"kind": "shipped_quality"}, "alpha": 2.0},
            "perceptual": {"model": {"kind": "solo", "weights": str(ASSETS / "judges/segmentation_model.safetensors")}},
        },
        "held_out": {"kind": "text_image", "weights": str(ASSETS / "judges/held_out_reward.safetensors")},
        "guard": {"every": 2, "prompts": 4, "variants": 2},
        "lora": LORA,
        "loop": {"steps": 2, "batch_size": 2, "learning_rate": 0.01},
        "test_images": 4,
    },
    gate={"distance": 1.0, "scores": 100.0, "masks": 1.0, "resamples": 100},
)


class World:
    """A project with a teacher, data that grow, and a registry in a real sqlite file."""

    def __init__(self, folder: Path, teacher: TeacherConfig, database: Path) -> None:
        self.folder, self.teacher = folder, teacher
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        shutil.copy(database, folder / "mlflow.db")
        self.models = ModelRegistry("hypersd", folder / "retrain", self.uri, str(folder / "artifacts"))
        self.points: list[int] = []

    def data(self, rows: int) -> AnnotatedData:
        data = DataConfig(source={"kind": "twemoji", "train": rows, "val": 4, "test": 8, "test_unseen": 4}, shard_rows=8, workers=1)
        generate_dataset(data)(self.folder / "dataset")
        manifest, _ = validate_rows(self.folder / "dataset", data)
        cache_latents(manifest, data, self.teacher)(self.folder / "latents")
        return AnnotatedData(manifest, data, LatentCache(self.folder / "latents"))

    def retrain(self, source: AnnotatedData, config: RetrainConfig = CONFIG) -> Decision:
        outputs = Outputs(CheckpointStore(self.folder / "checkpoints" / "retrain"), lambda values, step: self.points.append(step))
        retraining = Retraining(source, self.teacher, EVALUATION, config, self.models, outputs)
        return retraining.run(watch(source.manifest, source.latents, self.models, config))

    def champion(self) -> str:
        return str(MlflowClient(self.uri).get_model_version_by_alias("hypersd", "champion").version)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> World:
    folder = tmp_path_factory.mktemp("retrain")
    return World(folder, TeacherConfig(source=str(tiny.write_sd15(folder))), empty_database)


def test_from_new_data_to_a_champion_and_back(world: World, monkeypatch: pytest.MonkeyPatch):
    """The whole way in one test, since each step stands on the one before."""
    first = world.retrain(world.data(8))
    assert (first.outcome, first.version, first.champion) == ("promoted", "1", None)
    assert [check.name for check in first.checks] == ["weights", "diffusers"]
    assert world.points and not list((world.folder / "checkpoints").glob("*"))

    world.points.clear()
    again = world.retrain(world.data(8))
    assert (again.outcome, again.version, again.champion) == ("kept", None, "1") and not world.points
    assert again.reasons == ["The data did not change enough since version 1 was judged: 24 rows, added: 0, removed: 0."]

    # new rows: the challenger starts from the champion, needs one step instead of two, and takes its place
    starts: list[LoRA | None] = []
    real = run.train_challenger

    def watched(stages: object, start: LoRA | None, *rest: object) -> LoRA:
        starts.append(start)
        return real(stages, start, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "train_challenger", watched)
    second = world.retrain(world.data(12))
    assert (second.outcome, second.version, second.champion) == ("promoted", "2", "1"), second.markdown()
    assert second.change["added"] == {"train": 4, "val": 0, "test": 0, "test_unseen": 0}
    names = [check.name for check in second.checks]
    assert names[:2] == ["weights", "diffusers"] and {"clip_score", "text_image", "diversity", "mask_ap"} < set(names)
    assert "cheaper: 1 step and" in next(check.text for check in second.checks if check.name.endswith("_recon"))
    client = MlflowClient(world.uri)
    (start,) = starts
    assert lora_key(start) == client.get_model_version("hypersd", "1").tags["weights"]
    version = client.get_model_version("hypersd", "2")
    assert set(version.aliases) == {"champion", "challenger"} and version.tags["champion_before"] == "1"
    lora = world.models.read_lora(world.models.version("champion").fetch("lora", world.folder / "user"))
    assert Contract.of(lora).steps == 1 and lora_key(lora) == version.tags["weights"]

    # other rows, and a challenger that is neither better nor cheaper: judged, registered, kept
    strict = CONFIG.model_copy(update={"start": "scratch", "scratch": CONFIG.champion})
    kept = world.retrain(world.data(14), strict)
    assert (kept.outcome, kept.version, world.champion()) == ("kept", "3", "2") and "not cheaper" in " ".join(kept.reasons)
    assert starts[-1] is None
    assert client.get_model_version("hypersd", "3").aliases == ["challenger"]
    assert world.retrain(world.data(14), strict).version is None  # these data were judged

    assert world.models.rollback() == ("2", "1") and world.champion() == "1"
    assert "rolled_back" in client.get_model_version("hypersd", "2").tags
    with pytest.raises(UserError, match="version 1 is the first champion, so there is none to go back to"):
        world.models.rollback()
    assert world.champion() == "1"


@pytest.fixture
def served(world: World) -> Iterator[Server]:
    """A server of MLflow whose database is that of the world. The world's registry is reached through it."""
    server, direct = Server(world.folder / "mlflow.db"), world.models
    server.start()
    world.models = ModelRegistry("hypersd", world.folder / "retrain", server.uri)
    yield server
    world.models = direct
    server.stop()


def test_a_registry_that_goes_away_before_the_challenger_is_registered_costs_no_training_and_no_champion(
    world: World, served: Server, monkeypatch: pytest.MonkeyPatch
):
    source, before, real = world.data(16), world.champion(), run.sample_in_diffusers

    def then_it_goes_away(*arguments: Any) -> None:
        real(*arguments)
        served.stop()

    with monkeypatch.context() as patch:
        patch.setattr(run, "sample_in_diffusers", then_it_goes_away)
        with pytest.raises(
            UserError, match=r"registry at http://127.0.0.1:\d+ cannot be used .*; start or correct it, and give the command again"
        ):
            world.retrain(source)
    assert world.champion() == before
    points = len(world.points)
    served.start()
    assert world.retrain(source).version is not None
    assert len(world.points) == points  # the stage was finished, and its checkpoint is used


def test_a_champion_that_changed_meanwhile_is_not_overwritten(world: World):
    before = world.champion()
    version = world.models.version("challenger")
    with pytest.raises(UserError, match=f"another process made version {before} the champion meanwhile"):
        world.models.promote(version, "77")
    assert world.champion() == before


def test_weights_that_do_not_fit_and_a_file_that_diffusers_cannot_use_are_refused(world: World, tmp_path: Path):
    lora = world.models.read_lora(world.models.version("champion").fetch("lora", tmp_path / "champion"))
    other = TeacherConfig(source=str(tiny.write_sd15(tmp_path, seed=1)))
    with pytest.raises(UserError, match=r"was trained on the teacher .* teacher.source is another one"):
        check_weights(lora, other)
    with pytest.raises(UserError, match="does not fit the teacher's network"):
        check_weights(
            LoRA({name: tensor[..., :1] if name.endswith("A.weight") else tensor for name, tensor in lora.tensors.items()}), other
        )
    folder = tmp_path / "champion" / "lora"
    contract = {"scheduler": "DDIMScheduler", "steps": 1, "guidance_scale": 1.0, "eta": 0.0}
    sample_in_diffusers(folder, world.teacher, contract, "a cat")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"diffusers cannot sample with this LoRA .*train it again"):
        sample_in_diffusers(folder, world.teacher, contract, "a cat")


def test_a_registry_that_is_not_there_is_one_sentence_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)  # whose default is minutes of patience
    registry = ModelRegistry("hypersd", tmp_path, "http://me:hunter2-secret@127.0.0.1:9")
    with pytest.raises(UserError, match=r"MLflow's model registry at http://.*cannot be used") as caught:
        registry.version("champion")
    assert "hunter2-secret" not in str(caught.value)


def test_an_environment_has_a_model_of_its_own_and_a_new_one_has_no_champion(tmp_path: Path, empty_database: Path):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    load: Callable[[str], ModelRegistry] = lambda data: RegistryDataset(filepath="x", uri=uri, model="hypersd", data=data).load()  # noqa: E731
    assert (load("data").name, load("data/sdxl").name) == ("hypersd", "hypersd-sdxl")
    assert load("data").version("champion") is None
    with pytest.raises(UserError, match="hypersd has no champion"):
        load("data").rollback()
    with pytest.raises(MlflowException):
        MlflowClient(uri).get_registered_model("hypersd")  # asking made none
