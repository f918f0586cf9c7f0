"""`kedro options`: every option of a section, its value, and where it is set."""

from pathlib import Path

import pytest
from kedro.framework.startup import bootstrap_project

from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.options import options
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS

ROOT = Path(__file__).parents[1]


def listed(section: str, env: str = "base") -> dict[str, tuple[str, str]]:
    bootstrap_project(ROOT)
    loader = ProjectConfigLoader(str(ROOT / "conf"), env=env, **{**CONFIG_LOADER_ARGS, "default_run_env": env})
    return {key: (value, where) for key, value, where in options(loader, ROOT, section)}


def test_values_files_and_defaults_of_a_stage():
    found = listed("tscd_k4.stage")
    term = "tscd_k4.stage.terms.consistency"
    assert found[f"{term}.segments"] == ("4", "conf/base/parameters_tscd.yml")
    assert found[f"{term}.guidance"] == ("[2.5, 3.5]", "conf/base/parameters_tscd.yml")  # of the section that it is like
    assert found[f"{term}.solver_points"] == ("40", "default") and found[f"{term}.pure_noise"] == ("true", "default")
    assert found["tscd_k4.stage.loop.accumulate"] == ("1", "default") and found["tscd_k4.stage.sampling.one_step_timestep"] == (
        "null",
        "default",
    )


def test_an_extended_environment_is_named():
    found = listed("tscd_k8.stage.loop", env="sdxl")
    assert found["tscd_k8.stage.loop.accumulate"] == ("64", "conf/sdxl/parameters.yml")
    assert found["tscd_k8.stage.loop.batch_size"] == ("512", "conf/sd15/parameters.yml")
    assert set(found) == {key for key in listed("tscd_k8.stage") if key.startswith("tscd_k8.stage.loop.")}


def test_a_part_of_several_sections_and_an_unknown_one():
    assert {key.split(".")[0] for key in listed("dmd")} == {"dmd"}
    with pytest.raises(UserError, match=r"There is no section 'tscd_k3' in conf/; choose one of ablation, .*tscd_k8\.stage"):
        listed("tscd_k3")
