"""Feedback learning as a whole on a random teacher, with the real rewards and a real SOLO (of random weights)."""

import json
import shutil

import pytest
import tiny
import torch
from ranks import on_ranks

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.bench import prepare_reference
from hypersd_pipeline.evaluation.probe import Probe
from hypersd_pipeline.files import content_hashes
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.dual_encoder import load_dual_encoder
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.perception.config import SmallSoloConfig
from hypersd_pipeline.perception.protocol import LabelMap
from hypersd_pipeline.perception.solo import new_small_solo, save_small_solo
from hypersd_pipeline.recipes import feedback as recipe
from hypersd_pipeline.recipes.feedback import AnnotatedData
from hypersd_pipeline.recipes.prepare import cache_latents, generate_dataset, validate_rows
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.recipes.tradeoff import measure_tradeoff
from hypersd_pipeline.rewards.text_image import TextImageConfig, TextImageHead, TextImageHeadConfig, save_text_image
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import FeedbackConfig, changed

EVALUATION = EvaluationConfig(
    samples=6, unseen_samples=4, batch_size=6, student_steps=(1,), teacher_steps=(1,), bootstrap=100, grid_prompts=2
)
TARGETS = ("to_q", "to_v")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes with masks, a teacher and its cache, a reference, a distilled LoRA, and the configuration of a short training."""
    folder = tmp_path_factory.mktemp("feedback")
    teacher = TeacherConfig(source=str(tiny.write_sd15(folder)))
    data = DataConfig(source={"kind": "twemoji", "train": 16, "val": 6, "test": 8, "test_unseen": 4}, shard_rows=8, workers=1)
    generate_dataset(data)(folder / "dataset")
    manifest, _ = validate_rows(folder / "dataset", data)
    cache_latents(manifest, data, teacher)(folder / "latents")
    (folder / "reference").mkdir()
    prepare_reference(manifest, teacher, EVALUATION)(folder / "reference")
    latents = LatentCache(folder / "latents")
    files = {}
    for seed, role in enumerate(("trained", "held_out")):
        torch.manual_seed(seed)
        files[role] = folder / f"{role}.safetensors"
        save_text_image(TextImageHead(TextImageHeadConfig()), load_dual_encoder(), role, files[role], {})
    config = SmallSoloConfig(input_size=64, base_channels=8, feat_channels=16)
    save_small_solo(new_small_solo(config, LabelMap(), seed=0), config, folder / "solo.safetensors", {})
    stage = FeedbackConfig(
        sample={"steps": 2},
        terms={
            "anchor": {"weight": 1.0},
            "quality": {"kind": "reward", "reward": {"kind": "shipped_quality"}, "alpha": 50.0, "weight": 0.1},
            "text_image": {
                "kind": "reward", "reward": {"kind": "text_image", "weights": str(files["trained"])}, "alpha": 50.0, "weight": 0.1,
            },
            "perceptual": {"model": {"kind": "solo", "weights": str(folder / "solo.safetensors")}, "batch": 2},
        },
        held_out={"kind": "text_image", "weights": str(files["held_out"])},
        guard={"every": 2, "prompts": 4, "variants": 2, "patience": 9},
        lora={"rank": 2, "target_modules": TARGETS},
        loop={"steps": 4, "batch_size": 2, "learning_rate": 0.01, "log_every": 1, "checkpoint_every": 2},
        merge_weights=(0.5, 1.0),
        test_images=4,
    )  # fmt: skip
    return AnnotatedData(manifest, data, latents), teacher, folder / "reference", distilled(teacher, latents), stage


def distilled(teacher, latents):
    model = load_teacher(teacher, parts=("backbone",))
    adapters = AdaptedBackbone(model.backbone, model.process, rank=2, target_modules=TARGETS, names=("student",), trainable=())
    for parameter in adapters.parameters("student"):
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    contract = Contract(2).to_json(model.scheduler_config())
    return adapters.export("student", {"sampling_contract": contract, "data_rows": latents.parts["rows"]})


def train(world, path, stream=lambda values, step: None, terms=None, **changes):
    source, teacher, _, lora, stage = world
    stage = changed(stage, terms=terms or {})
    stage = FeedbackConfig.model_validate({**stage.model_dump(), **changes})
    return recipe.train_feedback(source, teacher, EVALUATION, lora, stage, Outputs(CheckpointStore(path), stream))


def test_trains_merges_and_measures(world, tmp_path, monkeypatch):
    source, teacher, reference, lora, stage = world
    seen, loaded, load = {}, [], TextImageConfig.load
    monkeypatch.setattr(TextImageConfig, "load", lambda config, device: loaded.append(config) or load(config, device))
    feedback, report = train(world, tmp_path, lambda values, step: seen.setdefault(step, {}).update(values))
    judges = (stage.held_out, stage.rewards[1].reward)
    assert sorted(str(config.weights) for config in loaded) == sorted(str(config.weights) for config in judges)  # each of them once
    assert {"guard/held_out_reward", "guard/diversity", "guard/distance"} <= seen[0].keys() and seen[0]["guard/distance"] < 1e-5
    assert {"reward_shipped_quality", "reward_text_image", "perceptual", "anchor"} <= seen[1].keys() and 4 in seen
    assert report["ended_by_guard"] == 0 and report["before/trained_reward"] == seen[0]["guard/trained_reward"]
    assert report["after/distance"] > 0 and set(feedback.tensors) == set(lora.tensors)
    merged = recipe.merge_feedback(lora, feedback, stage)
    assert set(merged) == {"w_0.50", "w_1.00"} and merged["w_1.00"].rank == 4
    frame, metrics, plot, grid = measure_tradeoff(source, teacher, reference, EVALUATION, lora, feedback, stage)
    assert frame.weight.tolist() == [0.0, 0.5, 1.0] and frame.distance[0] == pytest.approx(0, abs=1e-6) and frame.distance[2] > 0
    wanted = {"trained_reward", "held_out_reward", "diversity", "mask_ap", "fd_efficientnet_lite0_recon", "clip_score", "image_quality"}
    assert wanted <= metrics["w_1.00"].keys() and plot.width > 300 and grid.width > 3 * 128

    def flat():
        lines = measure_tradeoff(source, teacher, reference, EVALUATION, lora, feedback, stage)[1]
        return {f"{line}/{name}": float(v) for line, part in lines.items() if isinstance(part, dict) for name, v in part.items()}

    two, other = on_ranks(2, tmp_path / "two", flat)
    alone = {f"{line}/{name}": v for line, part in metrics.items() if isinstance(part, dict) for name, v in part.items()}
    assert two == other == pytest.approx(alone, rel=1e-4, abs=1e-5) and len(two) > 20


def test_the_images_of_the_table_are_the_probes_where_both_sample_alike(world, monkeypatch):
    """The same metrics come out as where the probe samples for itself, with fewer calls of the network."""
    source, teacher, reference, lora, stage = world
    stage = changed(stage, merge_weights=(1.0,))
    calls = []
    monkeypatch.setattr(Probe, "sample", lambda *args, sample=Probe.sample: calls.append(args[2]) or sample(*args))

    def measured(lora):
        calls.clear()
        metrics = measure_tradeoff(source, teacher, reference, EVALUATION, lora, lora, stage)[1]
        return {f"{line}/{name}": v for line, part in metrics.items() if isinstance(part, dict) for name, v in part.items()}, sum(calls)

    shared, few = measured(lora)
    noisy, more = measured(LoRA(lora.tensors, {**lora.metadata, "sampling_contract": with_eta(lora.metadata["sampling_contract"])}))
    monkeypatch.setattr(Probe, "samples_as", lambda *args: False)
    apart, many = measured(lora)
    assert shared == apart and many == more == few + 2 * EVALUATION.samples  # at the weights 0 and 1
    assert {name for name in noisy if noisy[name] != shared[name]} >= {"w_0.00/image_quality", "w_1.00/fd_efficientnet_lite0_recon"}
    assert noisy["w_1.00/held_out_reward"] == shared["w_1.00/held_out_reward"]  # the probe's own images have no eta


def with_eta(contract):
    return json.dumps({**json.loads(contract), "scheduler": "TCDScheduler", "eta": 0.5})


def test_resumed_equals_uninterrupted_bit_for_bit(world, tmp_path):
    whole, report = train(world, tmp_path / "whole")

    def dies(values, step):
        if step == 3:
            raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError, match="went away"):
        train(world, tmp_path / "parts", dies)
    resumed, again = train(world, tmp_path / "parts")
    assert all(torch.equal(whole.tensors[k], resumed.tensors[k]) for k in whole.tensors)
    assert again["after/held_out_reward"] == report["after/held_out_reward"]


def test_a_measurement_does_not_depend_on_how_many_images_are_held(world):
    """Only a batch of images is in memory, and each prompt has its own noise."""
    source, teacher, _, lora, stage = world
    model = load_teacher(teacher)
    merge_lora(model.backbone.module, lora)
    found = []
    for batch_size in (6, 2):
        evaluation = EVALUATION.model_copy(update={"batch_size": batch_size})
        probe = recipe.guard_probe(model, recipe.load_judges(stage, model.device), evaluation, stage, source.latents)
        held = [len(images) for _, images in probe.sample(model.denoiser(), 4)]
        assert max(held) <= batch_size and sum(held) == 4
        found.append(probe.measure(model.denoiser()))
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5) and found[0]["distance"] == pytest.approx(0, abs=1e-6)


def test_new_weights_under_the_same_name_are_another_training(world, tmp_path):
    """Of a published reward too, whose weights are a section and not a path."""
    from safetensors.torch import save_file

    from hypersd_pipeline.rewards.hps_v2 import HpsV2Config

    stage, file = world[-1], tmp_path / "hps.safetensors"
    other = stage.model_copy(update={"held_out": HpsV2Config(weights={"path": file})})
    keys = []
    for value in (0.0, 1.0):
        save_file({"x": torch.full((1,), value)}, file)
        keys.append(content_hashes(other.judge_files()))
    assert keys[0][:2] == keys[1][:2] and len(keys[0]) == 3  # the trained reward, SOLO, this one
    assert keys[0] != keys[1]


def test_a_held_out_reward_of_another_kind_is_laid_over_bases(world):
    """As an environment's `held_out: {kind: ...}` is merged with conf/base, whose packaged weights stay in it."""
    packaged = "src/hypersd_pipeline/assets/judges/held_out_reward.safetensors"
    values = changed(world[-1], terms={"quality": None}).model_dump()  # a reward that is trained on cannot be the held-out one
    for kind in ("shipped_quality", "laion_aesthetic", "image_reward"):
        stage = FeedbackConfig.model_validate({**values, "held_out": {"kind": kind, "weights": packaged}})
        assert stage.held_out.kind == kind
    with pytest.raises(ValueError, match="weights"):
        FeedbackConfig.model_validate({**values, "held_out": {"kind": "laion_aesthetic", "weights": "mine.pth"}})


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ((0.5, 0.502), "merge_weights must differ in their first two decimals"),
        ((0.0, 1.0), r"merge_weights\.0\n.*greater than 0"),
        ((-0.5,), r"merge_weights\.0\n.*greater than 0"),
    ],
)
def test_merge_weights_that_cannot_be_told_apart_are_refused(world, weights, told):
    with pytest.raises(ValueError, match=told):
        FeedbackConfig.model_validate({**world[-1].model_dump(), "merge_weights": weights})


def test_what_is_missing_is_said_before_any_step(world, tmp_path):
    steps = []
    stream = lambda values, step: steps.append(step)  # noqa: E731
    missing = {"kind": "text_image", "weights": str(tmp_path / "none.safetensors")}
    with pytest.raises(UserError, match=r"none.safetensors does not exist; run 'kedro run --pipelines reward_models'"):
        train(world, tmp_path, stream, held_out=missing)
    with pytest.raises(UserError, match=r"none.safetensors does not exist; run 'kedro run --pipelines reward_models'"):
        train(world, tmp_path, stream, terms={"text_image": {"reward": missing}})
    held_out = world[-1].held_out
    with pytest.raises(ValueError, match="held_out is one of the rewards that are trained on"):
        train(world, tmp_path, stream, terms={"text_image": {"reward": held_out.model_dump(), "alpha": 1.0}})
    copied = {**held_out.model_dump(), "weights": shutil.copy(held_out.weights, tmp_path / "copied.safetensors")}
    with pytest.raises(UserError, match="is the held-out reward, which only reports"):
        train(world, tmp_path, stream, terms={"text_image": {"reward": copied, "alpha": 1.0}})
    with pytest.raises(UserError, match="segmentation_model"):
        train(world, tmp_path, stream, terms={"perceptual": {"model": {"weights": str(tmp_path / "no.safetensors")}}})
    assert steps == []
