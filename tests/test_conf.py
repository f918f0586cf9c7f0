"""Every environment of ``conf/`` resolves and is valid, and sd15 and sdxl hold the paper's sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kedro.config import OmegaConfigLoader

from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.diffusion.grids import boundaries, check_grid, solver_grid
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
from hypersd_pipeline.pipelines.ablation.config import AblationConfig, plan
from hypersd_pipeline.pipelines.dmd.config import OneStepConfig
from hypersd_pipeline.pipelines.feedback.config import FeedbackConfig
from hypersd_pipeline.pipelines.tscd.config import StageOverrides, TscdDefaults
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS

CONF = Path(__file__).parents[1] / "conf"
ENVIRONMENTS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "local")


def parameters(env: str) -> dict[str, Any]:
    return OmegaConfigLoader(str(CONF), env=env, **{**CONFIG_LOADER_ARGS, "default_run_env": env})["parameters"]


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_environments_are_valid(env):
    values = parameters(env)
    TeacherConfig(**values["teacher"])
    DataConfig(**values["data"])
    EvaluationConfig(**values["evaluation"])
    for k in (8, 4, 2, 1):
        stage = StageOverrides(**values[f"tscd_k{k}"]["stage"]).apply(TscdDefaults(**values["tscd"]))
        check_grid(solver_grid(stage.solver_points), boundaries(stage.segments))
    FeedbackConfig(**values["feedback"]["stage"])
    for name in ("dmd", "one_step_unet", "baseline_dmd2", "baseline_dmd"):
        OneStepConfig(**values[name]["stage"])


@pytest.mark.parametrize("env", ["base", "ablation", "reference", "smoke"])
def test_the_ablation_s_budget_pays_for_every_cell(env):
    values = parameters(env)
    tscd = {k: StageOverrides(**values[f"tscd_k{k}"]["stage"]).apply(TscdDefaults(**values["tscd"])) for k in (8, 4, 2, 1)}
    config = AblationConfig(**{**values["ablation"], "only": None})
    cells = plan(config, tscd, {}, OneStepConfig(**values["dmd"]["stage"]), {})
    chosen = {"Hyper-SD", "8-4-2-1 hybrid"}
    assert chosen <= {cell.name for cell in cells}
    assert all(stage.loop.steps >= 1 for cell in cells for stage in cell.stages)


@pytest.mark.parametrize(
    ("env", "source", "resolution"),
    [("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512), ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 1024)],
)
def test_full_size_environments_hold_the_papers_sizes(env, source, resolution):
    values = parameters(env)
    teacher, data = TeacherConfig(**values["teacher"]), DataConfig(**values["data"])
    assert (teacher.source, teacher.resolution, teacher.dtype, teacher.vae_dtype) == (source, resolution, "float32", "float32")
    assert data.source.kind == "coco" and set(data.source.splits) == {"train", "val", "test"}
    for k in (8, 4, 2, 1):
        stage = StageOverrides(**values[f"tscd_k{k}"]["stage"]).apply(TscdDefaults(**values["tscd"]))
        assert (stage.segments, stage.solver_points, stage.teacher, stage.guidance) == (k, 40, "base", (3.0, 15.0))
        assert (stage.loop.batch_size, stage.loop.learning_rate, stage.loop.mixed_precision) == (512, 1e-6, "bf16")
        assert stage.loop.batch_size % stage.loop.accumulate == 0
        assert stage.gradient_checkpointing == (env == "sdxl")
    for name in ("dmd", "one_step_unet", "baseline_dmd2", "baseline_dmd"):
        one_step = OneStepConfig(**values[name]["stage"])
        assert one_step.matching.critic.updates == (10 if env == "sd15" else 5)  # DMD2's ratios
        assert one_step.loop.mixed_precision == "bf16" and one_step.loop.batch_size // one_step.loop.accumulate <= 16
        assert one_step.gradient_checkpointing == (env == "sdxl") and one_step.lora.rank in (16, 64)
        assert one_step.loop.learning_rate == (3e-5 if one_step.loop.optimizer == "adafactor" else 1e-6)


SDXL_UNET: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(("env", "unet", "millions"), [("sd15", {"cross_attention_dim": 768}, 67.3), ("sdxl", SDXL_UNET, 196.8)])
def test_loras_have_the_size_of_the_released_ones(env, unet, millions):
    lora = TscdDefaults(**parameters(env)["tscd"]).lora
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    with torch.device("meta"):  # shapes only
        model = UNet2DConditionModel(**unet)
        model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=list(lora.target_modules)))
    count = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert round(count / 1e6, 1) == millions
