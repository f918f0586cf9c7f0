"""A tiny random checkpoint of each layout goes through data preparation, one TSCD stage and sampling with diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler, UNet2DConditionModel
from worlds import prepare

from hypersd_pipeline.data.cache import LatentCache
from hypersd_pipeline.diffusion.grids import tcd_timesteps, trailing_timesteps
from hypersd_pipeline.diffusion.sampling import sample_ddim
from hypersd_pipeline.io.lora import LoRADataset
from hypersd_pipeline.models.lora import LoRA, merge_lora
from hypersd_pipeline.models.teacher import TeacherConfig, load_teacher
from hypersd_pipeline.recipes import distil as recipe
from hypersd_pipeline.recipes.one_step import make_pairs, train_unet, train_unified
from hypersd_pipeline.recipes.stage import Outputs
from hypersd_pipeline.training.checkpoints import CheckpointStore
from hypersd_pipeline.training.config import OneStepConfig, StageConfig

LAYOUTS = ("sd15", "sdxl")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_data_preparation_keeps_what_the_layout_needs(tmp_path, layout):
    config = TeacherConfig(source=str(tiny.write_teacher(tmp_path, layout)))
    train = prepare(tmp_path, config, sizes="image").split("train")
    teacher = load_teacher(config, ("text",), "cpu")
    indices = torch.tensor([0, 5])
    cond = train.conditioning(indices)
    expected = teacher.encode_prompts(train.captions(indices))
    torch.testing.assert_close(cond.prompt_embeds, expected.prompt_embeds)
    assert train.latent_shape == (4, 8, 8)
    if layout == "sdxl":
        torch.testing.assert_close(cond.pooled, expected.pooled)
        # 72 pixels high become 64. The crop is the middle of what is then wider
        widths = [96, 96 + 8 * 6]
        crops = [(round(w * 64 / 72) - 64) // 2 for w in widths]
        assert cond.sizes.tolist() == [[72, w, 0, left, 64, 64] for w, left in zip(widths, crops, strict=True)]
    torch.testing.assert_close(train.unconditional(1).prompt_embeds, teacher.unconditional(1).prompt_embeds)


def distil(tmp_path: Path, teacher: TeacherConfig, latents: LatentCache) -> LoRA:
    """Two steps of the stage k = 4, on every module that the released LoRAs change."""
    targets = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut")
    more = ("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
    stage = StageConfig(
        terms={"consistency": {"segments": 4, "guidance": (3.0, 9.0)}},
        lora={"rank": 4, "target_modules": (*targets, *more)},
        loop={"steps": 2, "batch_size": 4, "accumulate": 2, "learning_rate": 0.01},
        gradient_checkpointing=True,
    )
    logged: list[dict[str, float]] = []
    outputs = Outputs(CheckpointStore(tmp_path / "checkpoints"), lambda metrics, step: logged.append(metrics))
    trained, report = recipe.distil(latents, teacher, stage, outputs)
    assert logged and np.isfinite(report["final_loss"]) and report["total_skipped_steps"] == 0
    return trained


@pytest.mark.parametrize(("layout", "prediction_type"), [("sd15", "epsilon"), ("sd15", "v_prediction"), ("sdxl", "epsilon")])
def test_a_distilled_lora_samples_in_diffusers_as_here(tmp_path, layout, prediction_type):
    folder = tiny.write_teacher(tmp_path, layout, prediction_type)
    config = TeacherConfig(source=str(folder))
    lora = distil(tmp_path, config, prepare(tmp_path, config))
    LoRADataset(filepath=str(tmp_path / "lora_k4")).save(lora)

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    teacher = load_teacher(config, ("backbone", "text"), "cpu")
    cond = teacher.encode_prompts(tiny.CAPTIONS[:2])
    plain = sample_ddim(teacher.denoiser(), noise, cond, trailing_timesteps(4))
    merge_lora(teacher.backbone.module, lora)
    ours = sample_ddim(teacher.denoiser(), noise, cond, trailing_timesteps(4))

    pipe = tiny.load_pipeline(folder)
    pipe.load_lora_weights(tmp_path / "lora_k4")
    pipe.scheduler = DDIMScheduler.from_pretrained(tmp_path / "lora_k4")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(tiny.CAPTIONS[:2], num_inference_steps=4, guidance_scale=0, latents=noise, output_type="latent").images
    assert (ours - plain).abs().max() > 1e-3  # the LoRA does something
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("layout", "prediction_type"), [("sdxl", "epsilon"), ("sd15", "v_prediction")])
def test_the_one_step_stages_train_with_all_that_saves_memory(tmp_path, layout, prediction_type):
    """As conf/sdxl has it: bf16, accumulation, checkpointing, Adafactor, the average on the CPU. Every term. Then diffusers draws."""
    config = TeacherConfig(source=str(tiny.write_teacher(tmp_path, layout, prediction_type)))
    latents = prepare(tmp_path, config)
    terms = {
        "matching": {"guidance": (3.0, 7.0), "critic": {"updates": 3}},
        "regression": {"pairs": {"count": 4, "batch_size": 2, "steps": 2}},
        "adversarial": {"weight": 0.5, "pair": False, "renoise": True, "hidden": 32},
        "quality": {"kind": "reward", "reward": {"kind": "shipped_quality"}, "alpha": 10.0, "weight": 0.1},
    }
    loop = {"steps": 2, "batch_size": 4, "accumulate": 2, "learning_rate": 0.001, "mixed_precision": "bf16"}
    shared = {
        "gradient_checkpointing": True,
        "decode_checkpointing": True,
        "ema_on_cpu": True,
        "lora": {"rank": 2, "target_modules": ("to_q", "conv1")},
    }
    consistency = {"segments": 1, "guidance": (3.0, 9.0), "batch": 2}
    one = OneStepConfig(**shared, terms={**terms, "consistency": consistency}, loop=loop)
    whole = OneStepConfig(**shared, terms=terms, sample={"timestep": 800}, loop={**loop, "optimizer": "adafactor"})
    (tmp_path / "pairs").mkdir()
    outputs = Outputs(CheckpointStore(tmp_path / "c"), lambda values, step: None)
    make_pairs(latents, config, one, outputs)(tmp_path / "pairs")
    lora, report = train_unified(latents, config, one, tmp_path / "pairs", outputs)
    write, other = train_unet(latents, config, whole, tmp_path / "pairs", outputs)
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
    teacher = load_teacher(config, ("backbone", "text"), "cpu")
    merge_lora(teacher.backbone.module, lora)
    cond = teacher.encode_prompts(tiny.CAPTIONS[:2])
    ours = sample_ddim(teacher.denoiser(), noise, cond, tcd_timesteps(2))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    pipe.unload_lora_weights()
    pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    pipe.scheduler = LCMScheduler.from_pretrained(tmp_path / "unet")
    assert torch.isfinite(pipe(tiny.CAPTIONS[:2], timesteps=[800], guidance_scale=0, latents=noise, output_type="latent").images).all()
