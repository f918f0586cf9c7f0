"""The one-step stages as a whole: their start, exact resume, what changes, and that diffusers samples the same."""

import gc
import json

import pytest
import tiny
import torch
from diffusers import LCMScheduler, TCDScheduler, UNet2DConditionModel
from worlds import prepare

from hypersd_pipeline.diffusion.grids import tcd_timesteps, trailing_timesteps
from hypersd_pipeline.diffusion.sampling import sample_ddim
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.evaluation.sampling import generate, prompt_noise
from hypersd_pipeline.io.lora import LoRADataset
from hypersd_pipeline.models.adapters import AdaptedBackbone
from hypersd_pipeline.models.contract import Contract
from hypersd_pipeline.models.lora import lora_key, merge_lora
from hypersd_pipeline.models.one_step import CONTRACT
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.recipes import stage as recipe
from hypersd_pipeline.recipes.one_step import choose_start, make_pairs, train_unet, train_unified
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import OneStepConfig

LORA = {"rank": 2, "target_modules": ("to_q", "to_v", "conv1")}
LOOP = {"steps": 3, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "checkpoint_every": 2}
CONSISTENCY = {"segments": 1, "guidance": (3.0, 5.0)}
REGRESSION = {"pairs": {"count": 6, "batch_size": 4}}
GAN = {"weight": 0.5, "pair": False, "renoise": True, "hidden": 32}
QUALITY = {"kind": "reward", "reward": {"kind": "shipped_quality"}, "alpha": 100.0, "weight": 0.1}


def one_step(terms=None, **more):
    """A stage that matches, with further terms."""
    return OneStepConfig(**{"lora": LORA, "loop": LOOP, **more, "terms": {"matching": {"guidance": (3.0, 3.0)}, **(terms or {})}})


def quiet(values, step):
    pass


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher and its cache."""
    folder = tmp_path_factory.mktemp("dmd")
    teacher = TeacherConfig(source=str(tiny.write_sd15(folder)))
    return teacher, prepare(folder, teacher)


def some_lora(world, seed, rank=2, targets=LORA["target_modules"]):
    model = load_teacher(world[0], parts=("backbone",))
    adapters = AdaptedBackbone(model.backbone, model.process, rank=rank, target_modules=targets, names=("x",), trainable=())
    for parameter in adapters.parameters("x"):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return adapters.export("x", {"sampling_contract": "{}"})


@pytest.fixture(scope="module")
def start(world):
    return some_lora(world, 1)


def merged(world, *loras):
    """The teacher with ``(LoRA, weight)`` added one after the other."""
    model = load_teacher(world[0], parts=("backbone", "text"))
    for lora, weight in loras:
        merge_lora(model.backbone.module, lora, weight)
    return model


def noise_of(n=2, seed=5):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def same(ones, others):
    return ones.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in ones.items())


# --- settings and start


OFF = {"guidance": (3.0, 3.0), "weight": 0.0}


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({"matching": OFF}, "all that could train the student have weight 0 or are missing; set one of them"),
        ({"matching": OFF, "anchor": {}}, "all that could train the student have weight 0 or are missing; set one of them"),
        ({"matching": OFF, "consistency": {**CONSISTENCY, "weight": 0.0}, "quality": {**QUALITY, "weight": 0.0}}, "set one of them"),
        ({"matching": None}, "set one of them"),
        ({"adversarial": {**GAN, "pair": True}}, "no second point"),
        ({"adversarial": {**GAN, "encoder": "adapter"}}, "frozen encoder only"),
        ({"consistency": {**CONSISTENCY, "teacher": "previous_stage"}}, "no previous stage's LoRA beside its own; use base"),
    ],
)
def test_refusals(terms, expected):
    with pytest.raises(ValueError, match=expected):
        one_step(terms)


def test_without_a_weight_the_start_is_the_lora_itself(world, start):
    assert choose_start(start, some_lora(world, 2), one_step(feedback_weight=0.0)) is start


def test_the_start_is_the_sum_of_both_loras(world, start):
    feedback = some_lora(world, 2, rank=3, targets=("to_q", "to_k"))
    chosen = choose_start(start, feedback, one_step(feedback_weight=0.6))
    assert chosen.rank == 5
    x, t, text = noise_of(), torch.tensor([999, 400]), torch.randn(2, 5, 32)
    with torch.no_grad():
        one, other = (
            merged(world, *loras).backbone.module(x, t, text).sample for loras in ([(chosen, 1.0)], [(start, 1.0), (feedback, 0.6)])
        )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- the unified LoRA


def unified(world, path, stage, start=None, stream=quiet):
    folder = path.parent / "pairs"
    folder.mkdir(exist_ok=True)
    make_pairs(world[1], world[0], stage, Outputs(CheckpointStore(path), quiet), start)(folder)
    return train_unified(world[1], world[0], stage, folder, Outputs(CheckpointStore(path), stream), start)


ALL = {"regression": {**REGRESSION, "weight": 0.5}, "consistency": {**CONSISTENCY, "batch": 2}, "adversarial": GAN}


@pytest.mark.parametrize("consistency_weight", [0.0, 1.0])
@pytest.mark.parametrize("started", [False, True])
def test_it_trains_with_and_without_start_and_consistency(world, start, tmp_path, consistency_weight, started):
    logged = []
    stage = one_step({"consistency": {**CONSISTENCY, "weight": consistency_weight, "batch": 2}})
    trained, report = unified(world, tmp_path / "c", stage, start if started else None, lambda values, step: logged.append(values))
    terms = {"critic", "matching"} | ({"distance"} if consistency_weight else set())
    assert len(logged) == 3 and terms == {"critic", "matching", "distance", "regression", "adversarial"} & set(logged[0])
    assert report["total_skipped_steps"] == 0 and report["ideal_forwards"] == pytest.approx(9 + 5 * 2 / 4 * consistency_weight)
    assert trained.rank == 2 and all(torch.isfinite(tensor).all() for tensor in trained.tensors.values())
    if started:
        assert trained.tensors.keys() == start.tensors.keys()
        assert all(not torch.equal(trained.tensors[name], start.tensors[name]) for name in start.tensors)


def test_pairs_of_something_else_are_refused(world, start, tmp_path):
    stage = one_step({"regression": REGRESSION})
    make_pairs(world[1], world[0], stage, Outputs(CheckpointStore(tmp_path / "c"), quiet))(tmp_path)
    for train in (train_unet, train_unified):
        with pytest.raises(UserError, match="made with another model or other settings"):
            train(world[1], world[0], stage, tmp_path, Outputs(CheckpointStore(tmp_path / "c"), quiet), start)


def test_the_average_starts_from_the_start(world, start, tmp_path):
    trained, _ = unified(world, tmp_path / "c", one_step(ema_decay=0.9999999, loop={**LOOP, "steps": 1}), start)
    assert all(torch.allclose(trained.tensors[name], start.tensors[name], atol=1e-5) for name in start.tensors)


def test_a_wider_start_brings_its_rank(world, start, tmp_path):
    wide = choose_start(start, some_lora(world, 2, rank=3), one_step())
    assert unified(world, tmp_path / "c", one_step(loop={**LOOP, "steps": 1}), wide)[0].rank == 5


def test_its_metadata_has_the_tcd_contract(world, tmp_path):
    trained, _ = unified(world, tmp_path / "c", one_step(sampling={"eta": 0.3}, loop={**LOOP, "steps": 1}))
    assert Contract.of(trained) == Contract(1, 0.3, "tcd")
    assert json.loads(trained.metadata["sampling_contract"])["scheduler"] == "TCDScheduler"
    assert trained.metadata["data_rows"] == world[1].parts["rows"] and trained.metadata["data_key"] == world[1].key


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def dies(values, step):
    if step == 3:
        raise RuntimeError("the machine went away")


def last_checkpoint(path):
    (folder,) = [p for p in path.iterdir() if p.is_dir()]
    return CheckpointStore(path).load(folder.name)[1]


def test_unified_killed_and_resumed_equals_uninterrupted_bit_for_bit(world, start, tmp_path):
    stage, steps = one_step(ALL), []
    whole, _ = unified(world, tmp_path / "whole", stage, start)
    with pytest.raises(RuntimeError, match="went away"):
        unified(world, tmp_path / "parts", stage, start, dies)
    parts, _ = unified(world, tmp_path / "parts", stage, start, lambda values, step: steps.append(step))
    assert steps == [3] and same(whole.tensors, parts.tensors)
    one, other = (last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for part in ("modules", "optimizers", "generator"):
        assert_same(one[part], other[part])
    assert one["modules"]["critic"]["optimizer"]["state"] and one["modules"]["discriminator"]["head"]
    assert set(one["modules"]["adapters"]) == {"student", "ema", "critic"} and one["optimizers"]["discriminator"]["state"]


def test_another_consistency_loss_makes_the_checkpoint_stale(world, tmp_path):
    stage, other = (one_step({"consistency": {**CONSISTENCY, "guidance": w}}, loop={**LOOP, "steps": 1}) for w in ((3.0, 5.0), (9.0, 9.0)))
    first, _ = unified(world, tmp_path / "c", stage)
    second, _ = unified(world, tmp_path / "c", other)
    assert lora_key(first) != lora_key(second)


def unets():
    gc.collect()
    return {id(o) for o in gc.get_objects() if type(o) is UNet2DConditionModel}


def remembered(monkeypatch):
    """The teachers that a stage loads."""
    loaded = []
    monkeypatch.setattr(recipe, "load_teacher", lambda *args, **kwargs: loaded.append(load_teacher(*args, **kwargs)) or loaded[-1])
    return loaded


def base_of(model):
    weights = model.backbone.module.state_dict()
    return {name.replace(".base_layer", ""): value for name, value in weights.items() if ".lora_" not in name}


def test_one_unet_is_resident_and_its_base_stays(world, start, tmp_path, monkeypatch):
    before, found, loaded = unets(), [], remembered(monkeypatch)
    stage = one_step(ALL, loop={**LOOP, "log_every": 3})
    unified(world, tmp_path / "c", stage, start, lambda values, step: found.append(len(unets() - before)))
    assert found == [1]
    assert same(base_of(loaded[0]), load_teacher(world[0], parts=("backbone",)).backbone.module.state_dict())


def decodings(world, path, monkeypatch, **more):
    """Passes of the decoder in two steps, and what was logged."""
    loaded, logged, calls = remembered(monkeypatch), [], []

    def stream(values, step):
        logged.append(values)
        if step == 1:
            loaded[-1].vae.decoder.register_forward_pre_hook(lambda *_: calls.append(1))

    stage = one_step({"quality": QUALITY}, loop={**LOOP, "steps": 2}, **more)
    trained, _ = unified(world, path, stage, stream=stream)
    return trained, logged, len(calls)


def test_rewards_on_the_students_images(world, tmp_path, monkeypatch):
    trained, logged, calls = decodings(world, tmp_path / "a", monkeypatch)
    assert "reward_shipped_quality" in logged[0] and calls == 1
    assert not same(trained.tensors, unified(world, tmp_path / "b", one_step(loop={**LOOP, "steps": 2}))[0].tensors)


def test_a_stage_without_matching_trains_too(world, tmp_path):
    """Terms are free to combine: rewards on one-step samples, and consistency for the other steps."""
    logged = []
    stage = one_step({"matching": None, "consistency": {**CONSISTENCY, "batch": 2}, "quality": QUALITY}, loop={**LOOP, "steps": 1})
    unified(world, tmp_path / "c", stage, stream=lambda values, step: logged.append(values))
    assert {"distance", "reward_shipped_quality"} <= set(logged[0]) and not {"matching", "critic"} & set(logged[0])


def test_decode_checkpointing_decodes_each_image_once_more(world, tmp_path, monkeypatch):
    _, logged, calls = decodings(world, tmp_path / "a", monkeypatch, decode_checkpointing=True)
    plain = decodings(world, tmp_path / "b", monkeypatch)[1]
    assert calls == 2 * LOOP["batch_size"]
    assert logged[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert logged[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=0.01)  # a kinked reward moves so much with the batch size


def test_gradient_checkpointing_trains_the_same_lora(world, start, tmp_path):
    """With the consistency loss, whose graph stays open while critic and teacher compute."""
    short = {**LOOP, "steps": 1}
    stages = [one_step(ALL, loop=short, gradient_checkpointing=value) for value in (False, True)]
    plain, saved = (unified(world, tmp_path / str(i), stage, start)[0] for i, stage in enumerate(stages))
    assert all(torch.allclose(plain.tensors[name], saved.tensors[name], atol=1e-5) for name in plain.tensors)
    assert not any(torch.equal(plain.tensors[name], start.tensors[name]) for name in plain.tensors)


@pytest.fixture(scope="module")
def trained(world, start, tmp_path_factory):
    """A unified LoRA in its folder."""
    folder = tmp_path_factory.mktemp("trained")
    lora, _ = unified(world, folder / "c", one_step(), start)
    LoRADataset(filepath=str(folder / "lora")).save(lora)
    return lora, folder / "lora"


def pipeline_of(world, scheduler):
    pipe = tiny.load_pipeline(world[0].source)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("steps", "grid"), [(1, "tcd"), (2, "tcd"), (4, "tcd"), (8, "tcd"), (4, "trailing")], ids=lambda value: str(value))
def test_the_unified_lora_samples_in_diffusers_as_here(world, trained, steps, grid):
    lora, folder = trained
    noise, timesteps = noise_of(), {"tcd": tcd_timesteps, "trailing": trailing_timesteps}[grid](steps)
    model = merged(world, (lora, 1.0))
    cond = model.encode_prompts(tiny.CAPTIONS[:2])
    ours, plain = (sample_ddim(m.denoiser(), noise, cond, timesteps) for m in (model, merged(world)))
    pipe = pipeline_of(world, TCDScheduler.from_pretrained(folder))
    pipe.load_lora_weights(folder)
    asked = {"num_inference_steps": steps} if grid == "tcd" else {"timesteps": timesteps.tolist()}
    theirs = pipe(tiny.CAPTIONS[:2], **asked, eta=0.0, guidance_scale=0, latents=noise, output_type="latent").images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert (ours - plain).abs().max() > 1e-2  # the LoRA does something


def test_the_evaluation_samples_the_unified_lora_as_diffusers(world, trained):
    lora, folder = trained
    model = load_teacher(world[0])
    merge_lora(model.backbone.module, lora)
    contract, prompts = Contract.of(lora), tiny.CAPTIONS[:2]
    (ours,) = generate(model, model.encode_prompts(prompts), contract.timesteps(4, 1000), seed=3, batch_size=2, eta=contract.eta)
    pipe = pipeline_of(world, TCDScheduler.from_pretrained(folder))
    pipe.load_lora_weights(folder)
    noise = prompt_noise(range(2), (4, 8, 8), 3)
    theirs = pipe(prompts, num_inference_steps=4, eta=contract.eta, guidance_scale=0, latents=noise, output_type="pt").images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# --- the dedicated UNet


def dedicated(world, path, start=None, stream=quiet, terms=None, **more):
    folder = path.parent / "pairs"
    folder.mkdir(exist_ok=True)
    stage = one_step(terms, **{"sample": {"timestep": 800}, "loop": {**LOOP, "learning_rate": 1e-3}, **more})
    make_pairs(world[1], world[0], stage, Outputs(CheckpointStore(path), quiet), start)(folder)
    return train_unet(world[1], world[0], stage, folder, Outputs(CheckpointStore(path), stream), start)


def written(write, folder):
    folder.mkdir()
    write(folder)
    return UNet2DConditionModel.from_pretrained(folder, use_safetensors=True).eval()


@pytest.fixture(scope="module")
def one_step_unet(world, start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    write, report = dedicated(world, folder / "c", start)
    return written(write, folder / "unet"), folder / "unet", report


def test_every_weight_of_the_unet_is_trained(world, start, one_step_unet):
    before, after = merged(world, (start, 1.0)).backbone.module.state_dict(), one_step_unet[0].state_dict()
    assert after.keys() == before.keys()
    assert [name for name in after if torch.equal(after[name], before[name])] == []
    assert one_step_unet[2]["total_skipped_steps"] == 0 and one_step_unet[2]["ideal_forwards"] == pytest.approx(10)


def test_the_unet_starts_from_the_merged_start(world, start, tmp_path):
    write, _ = dedicated(world, tmp_path / "c", start, loop={**LOOP, "steps": 1}, ema_decay=0.9999999)
    trained = written(write, tmp_path / "unet").state_dict()
    merged_in, plain = (merged(world, *loras).backbone.module.state_dict() for loras in ([(start, 1.0)], []))
    assert all(torch.allclose(trained[name], merged_in[name], atol=1e-5) for name in trained)
    assert any(not torch.allclose(merged_in[name], plain[name], atol=1e-3) for name in trained)


def test_the_teacher_stays_while_the_unet_is_trained(world, tmp_path, monkeypatch):
    loaded, before, found = remembered(monkeypatch), unets(), []
    loop = {**LOOP, "learning_rate": 1e-3, "log_every": 3}
    dedicated(world, tmp_path / "c", stream=lambda values, step: found.append(len(unets() - before)), loop=loop)
    assert same(base_of(loaded[0]), load_teacher(world[0], parts=("backbone",)).backbone.module.state_dict())
    assert found == [3]  # student, average, and the teacher with the critic


def one_step_here(world, unet, noise):
    """The one-step sample at t = 800, and the conditioning."""
    model = merged(world)
    model.backbone.module.load_state_dict(unet.state_dict())
    cond = model.encode_prompts(tiny.CAPTIONS[:2])
    with torch.no_grad():
        return model.denoiser().clean(noise, 800, cond)


def test_the_unet_samples_in_diffusers_as_here(world, one_step_unet):
    unet, folder, _ = one_step_unet
    pipe = pipeline_of(world, LCMScheduler.from_pretrained(folder))
    pipe.unet, noise = unet, noise_of()
    theirs = pipe(
        tiny.CAPTIONS[:2], num_inference_steps=1, timesteps=[800], guidance_scale=0, latents=noise, output_type="latent"
    ).images  # fmt: skip
    torch.testing.assert_close(one_step_here(world, unet, noise), theirs, rtol=1e-3, atol=1e-3)


def test_the_evaluation_samples_the_unet_as_diffusers(world, one_step_unet):
    """What is measured is what users get: LCMScheduler's one step ends at x0 itself."""
    unet, folder, _ = one_step_unet
    contract = json.loads((folder / CONTRACT).read_text())
    model = load_teacher(world[0])
    model.backbone.module.load_state_dict(unet.state_dict())
    prompts, timesteps = tiny.CAPTIONS[:2], Contract(1, only_timestep=contract["timesteps"][0]).timesteps(1, 1000)
    seen = []
    decode, model.decode = model.decode, lambda latents: seen.append(latents) or decode(latents)
    list(generate(model, model.encode_prompts(prompts), timesteps, seed=3, batch_size=2, to_clean=True))
    torch.testing.assert_close(seen[0], one_step_here(world, unet, prompt_noise(range(2), (4, 8, 8), 3)), rtol=1e-3, atol=1e-3)


def test_the_unets_folder_has_its_contract(world, one_step_unet):
    contract = json.loads((one_step_unet[1] / CONTRACT).read_text())
    assert (contract["scheduler"], contract["timesteps"], contract["steps"]) == ("LCMScheduler", [800], 1)
    assert contract["data_rows"] == world[1].parts["rows"] and contract["teacher"] == world[0].source
    assert "timesteps=[800]" in (one_step_unet[1] / "README.md").read_text()


def test_an_average_on_the_cpu_gives_the_same_unet(world, start, one_step_unet, tmp_path):
    write, _ = dedicated(world, tmp_path / "c", start, ema_on_cpu=True)
    assert same(written(write, tmp_path / "unet").state_dict(), one_step_unet[0].state_dict())


def test_unet_killed_and_resumed_equals_uninterrupted_bit_for_bit(world, start, one_step_unet, tmp_path):
    with pytest.raises(RuntimeError, match="went away"):
        dedicated(world, tmp_path / "c", start, dies)
    steps = []
    write, _ = dedicated(world, tmp_path / "c", start, lambda values, step: steps.append(step))
    assert steps == [3] and same(written(write, tmp_path / "unet").state_dict(), one_step_unet[0].state_dict())


def test_the_unet_takes_all_terms(world, start, tmp_path):
    logged = []
    stream = lambda values, step: logged.append(values)  # noqa: E731
    terms = {"regression": {**REGRESSION, "weight": 0.5}, "adversarial": GAN, "quality": QUALITY}
    more = {"gradient_checkpointing": True, "loop": {**LOOP, "steps": 1}}
    _, report = dedicated(world, tmp_path / "c", start, stream, terms, **more)
    assert {"critic", "matching", "regression", "adversarial", "reward_shipped_quality"} <= set(logged[0])
    assert report["total_skipped_steps"] == 0


def test_a_timestep_beyond_the_schedule_is_refused_before_pairs_are_made(world, tmp_path):
    stage = one_step({"regression": REGRESSION}, sample={"timestep": 1000})
    with pytest.raises(UserError, match=r"timestep is 1000, but the teacher's timesteps end at 999"):
        make_pairs(world[1], world[0], stage, Outputs(CheckpointStore(tmp_path / "c"), quiet))(tmp_path)
    assert not list(tmp_path.iterdir())
    for train in (train_unified, train_unet):
        with pytest.raises(UserError, match="timestep is 1000"):
            train(world[1], world[0], stage, tmp_path, Outputs(CheckpointStore(tmp_path / "c"), quiet))
