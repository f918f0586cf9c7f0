"""A default stands in one place: in the configuration's class or in conf/base, never in both."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kedro.framework.project import pipelines
from kedro.framework.startup import bootstrap_project
from kedro.validation import TypeExtractor
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hypersd_pipeline.config_loader import ProjectConfigLoader, lookup
from hypersd_pipeline.settings import CONFIG_LOADER_ARGS

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ("base", "reference", "ablation", "sd15", "sdxl")
ONLY_FOR_USERS = {  # what a user's data or judges need. The shipped environments happen to have none of it
    ("Weights", "repo"), ("Weights", "file"), ("SplitSource", "of"), ("CocoSource", "splits"), ("TextImageConfig", "weights"),
    ("SoloConfig", "weights"), ("PerceptualConfig", "steps"), ("AblationConfig", "one_step_timestep"), ("AblationConfig", "baselines"),
    ("PartConfig", "train"), ("StyleConfig", "lora"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> dict[str, type[BaseModel]]:
    """Every typed section, by its key."""
    bootstrap_project(ROOT)
    pipelines.set_requested(None)
    return TypeExtractor(dict(pipelines)).extract_types_from_pipelines()  # type: ignore[return-value]


def parameters(env: str) -> dict[str, Any]:
    return ProjectConfigLoader(str(ROOT / "conf"), env=env, **{**CONFIG_LOADER_ARGS, "default_run_env": env})["parameters"]


def written_in_base() -> dict[str, Any]:
    """As it stands in the files, before `like` is followed."""
    files = sorted((ROOT / "conf/base").glob("parameters*.yml"))
    return {key: value for file in files for key, value in (yaml.safe_load(file.read_text()) or {}).items()}


def repeated(written: Any, config: Any, path: list[str], inherits: bool = False) -> Iterator[str]:
    """Keys of ``written`` whose value is the default of the class. One that resets an inherited value is none."""
    inherits = inherits or "like" in written
    for key, value in written.items():
        field, found = type(config).model_fields.get(key), getattr(config, key, None)
        if isinstance(found, BaseModel) and isinstance(value, dict):
            yield from repeated(value, found, [*path, key], inherits)
        elif isinstance(found, dict) and isinstance(value, dict):
            for name, inner in value.items():
                if isinstance(found.get(name), BaseModel) and isinstance(inner, dict):
                    yield from repeated(inner, found[name], [*path, key, name], inherits)
        elif field is not None and key != "kind" and not inherits and field.get_default(call_default_factory=True) == found:
            yield ".".join([*path, key])


def test_base_repeats_no_default_of_a_class(models):
    written, resolved = written_in_base(), parameters("base")
    found = []
    for key, model in models.items():
        values = lookup(written, key.split("."))
        if isinstance(values, dict):
            found += repeated(values, model.model_validate(lookup(resolved, key.split("."))), key.split("."))
    assert sorted(set(found) - {"teacher.source"}) == []  # the one key of its section, so that the section is not empty


def leaves(config: Any) -> Iterator[tuple[str, str, Any, Any]]:
    """Class, field, default and value of every field with a default, at every depth."""
    if isinstance(config, BaseModel):
        for name, field in type(config).model_fields.items():
            value, default = getattr(config, name), field.get_default(call_default_factory=True)
            owner = next(c for c in type(config).__mro__ if name in inspect.get_annotations(c))
            if default is not PydanticUndefined and not isinstance(value, BaseModel):
                yield owner.__name__, name, default, value
            yield from leaves(value)
    elif isinstance(config, dict | list | tuple):
        for item in config.values() if isinstance(config, dict) else config:
            yield from leaves(item)


def test_no_class_has_a_default_that_every_environment_overrides(models):
    used: dict[tuple[str, str], bool] = {}
    for env in ENVIRONMENTS:
        values = parameters(env)
        for key, model in models.items():
            given = lookup(values, key.split("."))
            if given is not None:
                for owner, name, default, value in leaves(model.model_validate(given)):
                    used[owner, name] = used.get((owner, name), False) or value == default
    assert {place for place, found in used.items() if not found} - ONLY_FOR_USERS == set()
