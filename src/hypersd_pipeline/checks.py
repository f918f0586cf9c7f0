"""Checks of configuration and inputs that turn what Kedro and pydantic say into one sentence for the user."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from kedro.config import AbstractConfigLoader, MissingConfigException
from kedro.framework import project
from kedro.framework.project import pipelines
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline
from kedro.validation import TypeExtractor
from pydantic import BaseModel, ValidationError

from hypersd_pipeline.errors import UserError


def registered_pipelines() -> list[str]:
    """Names that ``kedro run --pipelines`` accepts, read from the project's folders without importing them."""
    folders = (files(project.PACKAGE_NAME or __package__) / "pipelines").iterdir()
    return ["__default__", *sorted(folder.name for folder in folders if (folder / "pipeline.py").is_file())]


def check_pipelines(names: list[str]) -> None:
    """Raises UserError for a name that is not registered."""
    known = registered_pipelines()
    for name in names:
        if name not in known:
            raise UserError(f"There is no pipeline '{name}'; choose one of {', '.join(known)}.")


def check_environment(conf: Path, env: str | None) -> None:
    """Raises UserError if `env` (``--env`` or KEDRO_ENV) has no folder in `conf`."""
    if env and conf.is_dir() and not (conf / env).is_dir():
        known = sorted(path.name for path in conf.iterdir() if path.is_dir())
        raise UserError(f"There is no environment '{env}' in {conf}; choose one of {', '.join(known)}.")


def check_parameters(loader: AbstractConfigLoader, root: Path) -> None:
    """Validate each typed parameter of the requested pipelines.

    Raises:
        UserError: naming the first refused key, its file and the reason.
    """
    try:
        parameters = loader["parameters"]
    except MissingConfigException:
        return
    checked: dict[str, BaseModel] = {}
    for key, model in TypeExtractor(dict(pipelines)).extract_types_from_pipelines().items():
        value = _lookup(parameters, key.split("."))
        if value is None or not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        try:
            checked[key] = model.model_validate(value)
        except ValidationError as error:
            raise UserError(_sentence(error, key, loader, root)) from error
    for key, stage in checked.items():
        if "tscd" in checked and hasattr(stage, "check_with"):  # a stage is complete only with what all stages share
            try:
                stage.check_with(checked["tscd"])
            except ValidationError as error:
                raise UserError(_sentence(error, key, loader, root)) from error

    _check_masks(checked)


def _check_masks(checked: dict[str, Any]) -> None:
    """Raises UserError for segmentation feedback on data that cannot have instance masks, before any stage is trained."""
    data, feedback = checked.get("data"), checked.get("feedback.stage")
    if data is None or feedback is None or data.source.kind != "folder":
        return
    if feedback.perceptual is not None and feedback.judgement.perceptual_weight:
        raise UserError(
            "feedback.stage.perceptual: a data source of kind 'folder' has no instance masks; set it to null or use kind 'coco'."
        )


def _lookup(values: Any, path: list[str]) -> Any:
    for part in path:
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _sentence(error: ValidationError, key: str, loader: AbstractConfigLoader, root: Path) -> str:
    """The first complaint of `error` as one sentence with the key, its file and how many others there are."""
    first, *others = error.errors(include_url=False)
    path = [*key.split("."), *(str(part) for part in first["loc"])]
    file = _defining_file(path, loader, root)
    if first["type"] == "extra_forbidden":
        problem = "unknown key; correct its spelling or remove it"
    else:
        given = "" if first["type"] == "missing" else f" (it is {first['input']!r})"
        problem = f"{first['msg'][:1].lower()}{first['msg'][1:]}{given}"
    more = f" (and {len(others)} more)" if others else ""
    return f"{file}: {'.'.join(path)}: {problem}.{more}"


def _defining_file(path: list[str], loader: AbstractConfigLoader, root: Path) -> str:
    """The file of ``conf/`` that sets `path`, or the nearest key above it; the run's environment goes before base."""
    if _lookup(getattr(loader, "runtime_params", None) or {}, path) is not None:
        return "--params"
    conf = Path(loader.conf_source)
    envs = [loader.env or getattr(loader, "default_run_env", None), getattr(loader, "base_env", "base")]
    for depth in range(len(path), 0, -1):
        for env in filter(None, envs):
            for file in sorted((conf / env).glob("**/parameters*")):
                if _has(yaml.safe_load(file.read_text()) or {}, path[:depth]):
                    return str(file.relative_to(root) if file.is_relative_to(root) else file)
    return f"{conf.name}/base"


def _has(values: Any, path: list[str]) -> bool:
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def check_inputs(pipeline: Pipeline, catalog: CatalogProtocol) -> None:
    """Check that what `pipeline` reads and does not make itself is there.

    Raises:
        UserError: naming the missing parameter, or the missing file and the command that makes it.
    """
    for name in sorted(pipeline.inputs()):
        if name not in catalog:
            if name.startswith("params:"):
                raise UserError(f"Parameter '{name[7:]}' is missing; add it to a parameters file in conf/base or in your environment.")
            continue  # Kedro's own message: a mistake of wiring, not of the user
        if not name.startswith("params:") and name != "parameters" and not catalog.exists(name):
            where = getattr(catalog.get(name), "_filepath", None)
            raise UserError(f"'{name}'{f' ({where})' if where else ''} is missing; {_cure(name)}.")


def check_judges(pipeline: Pipeline, catalog: CatalogProtocol) -> None:
    """Find the weights of every reward and segmenter of `pipeline`, before stages that may train for days.

    Raises:
        UserError: naming the stage, the missing file and the cure. Judges that the run itself makes are not looked for.
    """
    if pipeline.all_outputs() & {"text_image_reward", "held_out_reward", "segmentation_model"}:
        return
    for name in sorted(pipeline.inputs()):
        find = getattr(catalog.load(name), "judge_files", None) if name.startswith("params:") and name in catalog else None
        if find is not None:
            try:
                find()
            except UserError as error:
                raise UserError(f"{name.removeprefix('params:')}: {error}") from error


def _cure(dataset: str) -> str:
    """The command that makes `dataset`: the smallest registered pipeline with it among its outputs."""
    pipelines.set_requested(None)
    makers = {name: made for name, made in pipelines.items() if dataset in made.all_outputs() and name != "__default__"}
    if not makers:
        return "put it there or correct its filepath in the catalog"
    smallest = min(makers, key=lambda name: len(makers[name].nodes))
    return f"run `kedro run --pipelines {smallest} --to-outputs {dataset}` first"
