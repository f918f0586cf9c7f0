"""Every environment of ``conf/`` resolves and is valid, and sd15 and sdxl hold the paper's sizes."""

from pathlib import Path
from typing import Any

import pytest
from kedro.config import OmegaConfigLoader

from hypersd_pipeline.data.config import DataConfig
from hypersd_pipeline.metrics.config import EvaluationConfig
from hypersd_pipeline.models.teacher import TeacherConfig
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


@pytest.mark.parametrize(
    ("env", "source", "resolution"),
    [("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 512), ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 1024)],
)
def test_full_size_environments_hold_the_papers_sizes(env, source, resolution):
    values = parameters(env)
    teacher, data = TeacherConfig(**values["teacher"]), DataConfig(**values["data"])
    assert (teacher.source, teacher.resolution, teacher.vae_dtype) == (source, resolution, "float32")
    assert data.source.kind == "coco" and set(data.source.splits) == {"train", "val", "test"}
