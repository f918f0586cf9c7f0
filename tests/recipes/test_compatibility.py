"""The compatibility report as a whole, on tiny teachers and on the shipped one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import worlds
from safetensors.torch import load_file, save_file

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.data.rows import Manifest
from hypersd_pipeline.data.validate import validate
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.sampling import generate
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.metrics.edges import condition_of
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.controlnet import controlled, load_controlnet, new_controlnet
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.models.teacher_check import check_teacher
from hypersd_pipeline.recipes.compatibility.config import CompatibilityConfig
from hypersd_pipeline.recipes.compatibility.measure import measure_compatibility
from hypersd_pipeline.recipes.compatibility.parts import style_scenes, train_parts
from hypersd_pipeline.recipes.compatibility.sampling import Studio, Way
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.training.checkpoints import CheckpointStore

LOOP = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "log_every": 1, "checkpoint_every": 2}
SHAPE = {"rank": 2, "target_modules": ["to_q", "to_v"]}
EVALUATION = EvaluationConfig(samples=4, unseen_samples=4, batch_size=4, bootstrap=100, grid_prompts=2)
CONFIG = CompatibilityConfig(
    controlnets={"canny": {"detector": "canny", "train": LOOP}, "scribble": {"detector": "scribble", "train": LOOP, "scales": [0.5, 1.0]}},
    bases={"openmoji": {"train": LOOP}},
    styles={"openmoji": {"train": LOOP, "lora": SHAPE, "weights": [1.0]}},
    steps=(1, 2),
    teacher_steps=3,
    prompts=4,
    scenes={"train": 12, "val": 1, "test": 6, "test_unseen": 1},
)


def lora_of(config: TeacherConfig) -> LoRA:
    """A LoRA with the unified LoRA's contract, which changes the network a little."""
    model = load_teacher(config, parts=("backbone",), device="cpu")
    adapters = AdaptedBackbone(model.backbone, model.process, rank=2, target_modules=("to_q", "to_v"), names=("student",))
    contract = Contract(1, eta=0.3, grid="tcd", one_step_timestep=800)
    lora = adapters.export("student", {"sampling_contract": contract.to_json(model.scheduler_config())})
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.05 * torch.randn(value.shape, generator=generator) for name, value in lora.tensors.items()}
    return LoRA(tensors, lora.metadata)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TeacherConfig, DataConfig, Manifest, LatentCache]:
    folder = tmp_path_factory.mktemp("world")
    teacher = TeacherConfig(source=str(tiny.write_sd15(folder)))
    latents = worlds.prepare(folder, teacher)
    data = DataConfig(source={"kind": "folder", "root": str(folder / "images")})
    return folder, teacher, data, validate(data.source, folder / "dataset")[0], latents


def made(world: Any, folder: Path, config: CompatibilityConfig = CONFIG) -> tuple[Path, Path, list[str]]:
    """The folders of parts and scenes, and the names of the metrics that were logged."""
    _, teacher, data, manifest, latents = world
    scenes, parts, seen = folder / "scenes", folder / "parts", []
    for path in (scenes, parts):
        path.mkdir(parents=True, exist_ok=True)
    style_scenes(config)(scenes)
    outputs = Outputs(CheckpointStore(folder / "checkpoints"), lambda values, step: seen.extend([step, *values]))
    train_parts(manifest, data, latents, scenes, teacher, config, outputs)(parts)
    return parts, scenes, seen


def test_the_report_from_training_to_tables(world, tmp_path):
    _, teacher, _, manifest, _ = world
    parts, scenes, seen = made(world, tmp_path)
    assert {path.name for path in parts.iterdir()} == {"controlnet_canny", "controlnet_scribble", "base_openmoji", "style_openmoji"}
    assert [step for step in seen if isinstance(step, int)] == list(range(1, 13))  # one curve after the other
    check_teacher(TeacherConfig(source=str(parts / "base_openmoji")))
    before = load_file(Path(teacher.source) / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(parts / "base_openmoji" / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys() and not torch.equal(before["conv_in.weight"], after["conv_in.weight"])

    table, frame, metrics, controls, bases = measure_compatibility(lora_of(teacher), teacher, manifest, EVALUATION, CONFIG, parts, scenes)
    rows = set(zip(frame.group, frame.name, frame.weight, frame.model, frame.steps, strict=True))
    ways = (("without", 3), ("unified", 1), ("unified", 2))
    expected = {("controlnet", "canny", 1.0), ("controlnet", "scribble", 0.5), ("controlnet", "scribble", 1.0)}
    expected |= {("base", "teacher's base", 1.0), ("base", "openmoji", 1.0), ("style", "openmoji", 1.0)}
    assert rows == {(*row, *way) for row in expected for way in ways} | {("reference", "VAE reconstructions", 1.0, "-", 0)}
    plain = frame[(frame.group == "base") & (frame.name == "teacher's base")]
    assert {"edge_f1_canny", "edge_f1_scribble", "clip_score", "image_quality", "fd_efficientnet_lite0_style"} <= set(plain.metric)
    assert set(frame.samples) == {4} and (frame.low <= frame.value).all() and (frame.value <= frame.high).all()
    assert metrics["controlnet_canny_1"]["unified_2_steps"].keys() == {
        "edge_f1_canny", "clip_score", "image_quality", "fd_efficientnet_lite0_teacher",
    }  # fmt: skip
    assert all(f"|{name}|" in table for name in ("canny", "scribble", "openmoji")) and "4 prompts" in table
    assert controls.width == bases.width > 9 * 128  # two ControlNets with their conditions, and three models of three rows

    weights = (parts / "style_openmoji" / "pytorch_lora_weights.safetensors").read_bytes()
    again, _, more = made(world, tmp_path)
    assert more == [] and (again / "style_openmoji" / "pytorch_lora_weights.safetensors").read_bytes() == weights  # all was finished


# --- sampling ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sd15", "sdxl"])
def test_the_pipelines_of_diffusers_draw_what_the_evaluation_measures(tmp_path, layout):
    """One step with the LoRA, a guided walk without it, and a new ControlNet, which changes nothing."""
    config = TeacherConfig(source=str(tiny.write_teacher(tmp_path, layout)))
    lora, model, prompts = lora_of(config), load_teacher(config, device="cpu"), tiny.CAPTIONS
    studio = Studio(load_teacher(config, device="cpu"), lora, EVALUATION)
    cond = model.encode_prompts(prompts)
    options = {"seed": EVALUATION.seed, "batch_size": EVALUATION.batch_size}
    guided = model.denoiser().guided(model.unconditional(), EVALUATION.guidance_scale)
    grid = Contract(3).timesteps(3, 1000)
    without = torch.cat(list(generate(model, cond, grid, denoiser=guided, **options)))
    network = new_controlnet(model.backbone, 8, seed=0).eval()
    merge_lora(model.backbone.module, lora)
    once = torch.cat(list(generate(model, cond, Contract.of(lora).timesteps(1, 1000), **options)))
    conditions = torch.rand(len(prompts), 3, model.resolution, model.resolution).round()
    assert not torch.allclose(once, without, atol=0.05)
    for ours, few, steps in ((once, True, 1), (without, False, 3), (once, True, 1)):
        assert torch.allclose(torch.cat(list(studio.sample(prompts, Way(steps, few)))), ours, atol=1e-3)
        theirs = torch.cat(list(studio.sample(prompts, Way(steps, few, controlnet=network), conditions)))
        assert torch.allclose(theirs, ours, atol=1e-3)


def test_noise_of_a_prompt_is_the_same_in_every_batch(world):
    _, teacher, *_ = world
    lora = lora_of(teacher)
    one, four = (
        Studio(load_teacher(teacher), lora, EVALUATION.model_copy(update={"batch_size": size})).sample(tiny.CAPTIONS, Way(4, True))
        for size in (1, 4)
    )
    assert torch.allclose(torch.cat(list(one)), torch.cat(list(four)), atol=1e-4)


def test_a_style_lora_counts_by_its_weight(world, tmp_path):
    _, teacher, *_ = world
    model = load_teacher(teacher, parts=("backbone",), device="cpu")
    adapters = AdaptedBackbone(model.backbone, model.process, rank=2, target_modules=("to_q", "to_v"), names=("student",))
    generator = torch.Generator().manual_seed(1)
    tensors = {name: 0.2 * torch.randn(value.shape, generator=generator) for name, value in adapters.export("student", {}).tensors.items()}
    save_file(tensors, tmp_path / "style.safetensors")
    studio = Studio(load_teacher(teacher), lora_of(teacher), EVALUATION, style=tmp_path / "style.safetensors", key="x")
    none, zero, half, full = (torch.cat(list(studio.sample(tiny.CAPTIONS, Way(1, True, style_weight=w)))) for w in (None, 0.0, 0.5, 1.0))
    assert torch.allclose(none, zero, atol=1e-4)
    assert 1e-4 < (half - none).abs().mean() < (full - none).abs().mean()


# --- ControlNets -------------------------------------------------------------------------------------------------------------------------


def test_a_controlnet_hears_its_condition_after_a_few_updates(world):
    """diffusers' own initialisation would let nothing of the condition through by then."""
    _, teacher, *_ = world
    model = load_teacher(teacher, device="cpu")
    network = new_controlnet(model.backbone, 8, seed=0).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(4, *model.latent_shape, generator=generator) for _ in range(2))
    cond, t = model.encode_prompts([""] * 4), torch.full((4,), 500)
    condition = condition_of(torch.rand(64, 64, generator=generator) > 0.9, "canny").expand(4, 3, 64, 64)
    losses = []
    for _ in range(8):
        loss = (controlled(model.backbone, network, x, t, cond, condition) - z).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        plain = model.backbone(x, t, cond)
        told, other = (controlled(model.backbone, network, x, t, cond, c) for c in (condition, condition.flip(-1)))
    assert (told - other).abs().mean() > 0.02 * (told - plain).abs().mean() > 0


# --- mistakes ----------------------------------------------------------------------------------------------------------------------------


def combined(**entries: Any) -> CompatibilityConfig:
    return CompatibilityConfig(**{"controlnets": {}, "bases": {}, "styles": {}, **entries})


def controls(**canny: Any) -> dict[str, Any]:
    return {"controlnets": {"canny": {"detector": "canny", **canny}}}


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (controls(source="/nowhere"), "compatibility.controlnets.canny.source: there is no folder /nowhere"),
        (controls(source="{unet}"), "holds a UNet2DConditionModel, not a ControlNetModel"),
        ({"bases": {"mine": {"source": "/nowhere"}}}, "compatibility.bases.mine.source: there is no folder /nowhere"),
        ({"bases": {"mine": {"source": "{sdxl}"}}}, "compatibility.bases.mine.source: its layout is sdxl, but the teacher's is sd15"),
        ({"styles": {"ink": {"source": "/nowhere.safetensors"}}}, "compatibility.styles.ink.source: there is no file or folder"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_anything_is_computed(world, tmp_path, entries, told):
    teacher = world[1]
    names = {"{unet}": str(Path(teacher.source) / "unet")}
    if "{sdxl}" in str(entries):
        names["{sdxl}"] = str(tiny.write_sdxl(tmp_path))
    for part in entries.values():
        for name, entry in part.items():
            part[name] = {**entry, "source": names.get(entry["source"], entry["source"])}
    with pytest.raises(UserError) as error:
        combined(**entries).check(check_teacher(teacher).teacher)
    assert told in str(error.value)


def test_scenes_of_another_size_than_the_teachers_are_refused(world):
    large = check_teacher(world[1].model_copy(update={"resolution": 128})).teacher
    with pytest.raises(UserError, match=r"compatibility\.bases\.openmoji\.train: the scenes in OpenMoji's style have 64 pixels"):
        combined(bases={"openmoji": {"train": LOOP}}).check(large)


def test_a_controlnet_for_another_model_is_refused(world, tmp_path):
    model = load_teacher(world[1], parts=("backbone",), device="cpu")
    new_controlnet(model.backbone, 8, seed=0).save_pretrained(tmp_path / "net")
    assert load_controlnet(tmp_path / "net", model.backbone, "x").dtype == torch.float32
    other = load_teacher(TeacherConfig(source=str(tiny.write_sdxl(tmp_path))), parts=("backbone",), device="cpu")
    with pytest.raises(UserError, match="its cross_attention_dim is 32, but the teacher's 80"):
        load_controlnet(tmp_path / "net", other.backbone, "x")


def test_an_entry_has_a_source_or_is_trained():
    with pytest.raises(ValueError, match="it has neither source nor train"):
        combined(**controls())
    assert not list(combined(bases={"mine": {"train": LOOP, "source": "x"}}).in_style())
    with pytest.raises(ValueError, match="needs its shape"):
        combined(styles={"ink": {"train": LOOP}})
