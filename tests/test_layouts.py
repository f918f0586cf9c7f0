"""A tiny random checkpoint of each layout goes through data preparation, one TSCD stage and sampling with diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler, UNet2DConditionModel
from PIL import Image

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.diffusion.grids import tcd_timesteps, trailing_timesteps
from hypersd_pipeline.diffusion.sampling import sample_ddim
from hypersd_pipeline.io.lora import LoRADataset
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.pipelines.data_prep.nodes import cache_latents, generate_dataset, validate_rows
from hypersd_pipeline.pipelines.dmd.config import OneStepConfig
from hypersd_pipeline.pipelines.dmd.nodes import train_unet, train_unified
from hypersd_pipeline.pipelines.dmd.pairs import make_pairs
from hypersd_pipeline.pipelines.tscd.config import StageOverrides, TscdDefaults
from hypersd_pipeline.pipelines.tscd.nodes import train_stage
from hypersd_pipeline.training.checkpoints import CheckpointStore

LAYOUTS = ("sd15", "sdxl")


def write_pictures(root: Path, n: int = 8) -> Path:
    """Random pictures of several sizes with a caption file each, as a user might bring them."""
    rng = np.random.default_rng(0)
    for i in range(n):
        split = root / ("test" if i % 4 == 3 else "train")
        split.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (72, 96 + 8 * i, 3), dtype=np.uint8)).save(split / f"{i}.png")
        (split / f"{i}.txt").write_text(tiny.CAPTIONS[i % len(tiny.CAPTIONS)])
    return root


def prepare(tmp_path: Path, teacher: TeacherConfig) -> LatentCache:
    """Data preparation, node by node."""
    data = DataConfig(source={"kind": "folder", "root": str(write_pictures(tmp_path / "pictures"))}, shard_rows=4, batch_size=3, workers=1)
    generate_dataset(data)(tmp_path / "dataset")
    manifest, rejected = validate_rows(tmp_path / "dataset", data)
    assert rejected.empty and {name: len(rows) for name, rows in manifest.splits.items()} == {"train": 6, "test": 2}
    cache_latents(manifest, data, teacher)(tmp_path / "latents")
    return LatentCache(tmp_path / "latents")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_preparation_keeps_what_the_layout_needs(tmp_path, layout):
    config = TeacherConfig(source=str(tiny.write_teacher(tmp_path, layout)))
    train = prepare(tmp_path, config).split("train")
    teacher = load_teacher(config, ("text",), "cpu")
    indices = torch.tensor([0, 5])
    cond = train.conditioning(indices)
    expected = teacher.encode_prompts(train.captions(indices))
    torch.testing.assert_close(cond.prompt_embeds, expected.prompt_embeds)
    assert train.latent_shape == (4, 8, 8)
    if layout == "sdxl":
        torch.testing.assert_close(cond.pooled, expected.pooled)
        # 72 pixels high become 64; the crop is the middle of what is then wider
        widths = [96, 96 + 8 * 6]
        crops = [(round(w * 64 / 72) - 64) // 2 for w in widths]
        assert cond.time_ids.tolist() == [[72, w, 0, left, 64, 64] for w, left in zip(widths, crops, strict=True)]
    torch.testing.assert_close(train.unconditional(1).prompt_embeds, teacher.unconditional(1).prompt_embeds)


def distil(tmp_path: Path, teacher: TeacherConfig, latents: LatentCache) -> LoRA:
    """Two steps of the stage k = 4, on every module that the released LoRAs change."""
    targets = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut")
    more = ("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
    lora = {"rank": 4, "target_modules": (*targets, *more)}
    defaults = TscdDefaults(guidance=(3.0, 9.0), lora=lora, loop={"steps": 2, "batch_size": 4, "accumulate": 2, "learning_rate": 0.01})
    logged: list[dict[str, float]] = []
    trained, report = train_stage(
        latents,
        teacher,
        defaults,
        StageOverrides(segments=4, gradient_checkpointing=True),
        CheckpointStore(tmp_path / "checkpoints"),
        lambda metrics, step: logged.append(metrics),
    )
    assert logged and np.isfinite(report["final_loss"]) and report["total_skipped_steps"] == 0
    return trained


@pytest.mark.parametrize(("layout", "prediction_type"), [("sd15", "epsilon"), ("sd15", "v_prediction"), ("sdxl", "epsilon")])
def test_a_distilled_lora_samples_in_diffusers_as_here(tmp_path, layout, prediction_type):
    folder = tiny.write_teacher(tmp_path, layout, prediction_type)
    config = TeacherConfig(source=str(folder))
    lora = distil(tmp_path, config, prepare(tmp_path, config))
    LoRADataset(filepath=str(tmp_path / "lora_k4")).save(lora)

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    teacher = load_teacher(config, ("unet", "text"), "cpu")
    cond = teacher.encode_prompts(tiny.CAPTIONS[:2])
    arguments = (noise, cond, trailing_timesteps(4), teacher.schedule, teacher.prediction_type)
    plain = sample_ddim(teacher.denoiser(), *arguments)
    merge_lora(teacher.unet, lora)
    ours = sample_ddim(teacher.denoiser(), *arguments)

    pipe = tiny.load_pipeline(folder)
    pipe.load_lora_weights(tmp_path / "lora_k4")
    pipe.scheduler = DDIMScheduler.from_pretrained(tmp_path / "lora_k4")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(tiny.CAPTIONS[:2], num_inference_steps=4, guidance_scale=0, latents=noise, output_type="latent").images
    assert (ours - plain).abs().max() > 1e-3  # the LoRA does something
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("layout", "prediction_type"), [("sdxl", "epsilon"), ("sd15", "v_prediction")])
def test_the_one_step_stages_train_with_all_that_saves_memory(tmp_path, layout, prediction_type):
    """As conf/sdxl has it: bf16, accumulation, checkpointing, Adafactor, the average on the CPU; every term; then diffusers draws."""
    config = TeacherConfig(source=str(tiny.write_teacher(tmp_path, layout, prediction_type)))
    latents = prepare(tmp_path, config)
    shared = {
        "adversarial": {"weight": 0.5, "pair": False, "renoise": True, "hidden": 32},
        "rewards": [{"reward": {"kind": "shipped_quality"}, "alpha": 10.0, "weight": 0.1}],
        "pairs": {"count": 4, "batch_size": 2, "steps": 2},
        "gradient_checkpointing": True,
        "decode_checkpointing": True,
        "ema_on_cpu": True,
        "lora": {"rank": 2, "target_modules": ("to_q", "conv1")},
    }
    matching = {"guidance": (3.0, 7.0), "regression_weight": 1.0, "critic": {"updates": 3}}
    loop = {"steps": 2, "batch_size": 4, "accumulate": 2, "learning_rate": 0.001, "mixed_precision": "bf16"}
    one = OneStepConfig.model_validate(
        {**shared, "matching": {**matching, "consistency_weight": 1.0, "consistency_batch": 2}, "loop": loop}
    )
    whole = OneStepConfig.model_validate(
        {**shared, "matching": {**matching, "time_input": 800}, "loop": {**loop, "optimizer": "adafactor"}}
    )
    defaults = TscdDefaults(guidance=(3.0, 9.0), lora=shared["lora"], loop=loop)
    quiet = lambda values, step: None  # noqa: E731
    (tmp_path / "pairs").mkdir()
    make_pairs(latents, config, one)(tmp_path / "pairs")
    store = CheckpointStore(tmp_path / "c")
    lora, report = train_unified(latents, config, defaults, StageOverrides(segments=1), one, tmp_path / "pairs", store, quiet)
    write, other = train_unet(latents, config, whole, tmp_path / "pairs", store, quiet)
    assert all(np.isfinite(r["final_loss"]) and r["total_skipped_steps"] == 0 for r in (report, other))

    LoRADataset(filepath=str(tmp_path / "unified")).save(lora)
    (tmp_path / "unet").mkdir()
    write(tmp_path / "unet")
    pipe = tiny.load_pipeline(Path(config.source))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "unified")
    pipe.scheduler = TCDScheduler.from_pretrained(tmp_path / "unified")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipe(tiny.CAPTIONS[:2], num_inference_steps=2, eta=0.0, guidance_scale=0, latents=noise, output_type="latent").images
    teacher = load_teacher(config, ("unet", "text"), "cpu")
    merge_lora(teacher.unet, lora)
    cond = teacher.encode_prompts(tiny.CAPTIONS[:2])
    ours = sample_ddim(teacher.denoiser(), noise, cond, tcd_timesteps(2), teacher.schedule, teacher.prediction_type)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    pipe.unload_lora_weights()
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    pipe.scheduler = LCMScheduler.from_pretrained(tmp_path / "unet")
    assert torch.isfinite(pipe(tiny.CAPTIONS[:2], timesteps=[800], guidance_scale=0, latents=noise, output_type="latent").images).all()
