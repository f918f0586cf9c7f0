"""Checks of configuration and inputs that turn what Kedro and pydantic say into one sentence for the user."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from kedro.config import AbstractConfigLoader, MissingConfigException
from kedro.framework import project
from kedro.framework.project import pipelines
from kedro.io import CatalogProtocol, DatasetError
from kedro.pipeline import Pipeline
from kedro.validation import TypeExtractor
from pydantic import BaseModel, Tag, ValidationError

from hypersd_pipeline.config_loader import ProjectConfigLoader, lookup
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.io.lora import LoRADataset
from hypersd_pipeline.sections import nearest, unread

if TYPE_CHECKING:  # an error message need not wait for torch
    from hypersd_pipeline.training.config import StageConfig

_SEGMENTS = re.compile(r"(.*[._])?k(?P<k>[1248])(\.stage)?")
"""The key of a stage that is named after its segments."""


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


def check_runner(runner: str | None, is_async: bool = False) -> None:
    """Raises UserError for anything that would run nodes beside each other: they share one device and one MLflow run."""
    from kedro.runner import SequentialRunner
    from kedro.utils import load_obj

    why = "nodes run one after another, since they share one device and one MLflow run"
    if is_async:
        raise UserError(f"--async: {why}, so leave the option out.")
    if runner and not runner.startswith("<"):  # Kedro's text of an object. Its command line has checked the name
        try:
            kind = load_obj(runner, "kedro.runner")
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"--runner: there is no runner '{runner}', so leave the option out.") from error
        if not (isinstance(kind, type) and issubclass(kind, SequentialRunner)):
            raise UserError(f"--runner {runner}: {why}, so leave the option out.")
    elif runner and ("ThreadRunner" in runner or "ParallelRunner" in runner):
        raise UserError(f"runner {runner.split()[0].rpartition('.')[2]}: {why}, so use SequentialRunner.")


def check_processes(environment: Mapping[str, str]) -> None:
    """Raises UserError where torchrun or accelerate has started this command: each process would train and write the same."""
    world = environment.get("WORLD_SIZE", "1")
    if world.isdigit() and int(world) > 1:
        raise UserError(
            f"WORLD_SIZE is {world}: a run starts the processes of each stage itself, so start it without torchrun or accelerate launch, "
            "and set compute.processes."
        )


def check_parameters(loader: AbstractConfigLoader, root: Path) -> None:
    """Validate each typed parameter of the requested pipelines.

    Raises:
        UserError: naming the first refused key, its file and the reason; a key that nothing reads is refused too.
    """
    try:
        parameters = loader["parameters"]
    except MissingConfigException:
        return
    _check_sections(parameters, loader, root)
    checked: dict[str, BaseModel] = {}
    for key, model in TypeExtractor(dict(pipelines)).extract_types_from_pipelines().items():
        value = lookup(parameters, key.split("."))
        if value is None or not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        try:
            checked[key] = model.model_validate(value)
        except ValidationError as error:
            raise UserError(_sentence(error, key, model, parameters, loader, root)) from error
    _check_stages(checked, loader, root)
    _check_shares(checked, loader, root)
    _check_data(checked)


def _check_sections(parameters: dict[str, Any], loader: AbstractConfigLoader, root: Path) -> None:
    """Raises UserError for a key above the typed sections that no pipeline reads, whichever pipelines are asked for."""
    assert isinstance(loader, ProjectConfigLoader)  # settings.CONFIG_LOADER_CLASS
    with _all_pipelines() as registered:
        inputs = {name for pipeline in registered.values() for name in pipeline.inputs()}
    if "parameters" in inputs:  # a pipeline that takes them all
        return
    read = {tuple(name.removeprefix("params:").split(".")) for name in inputs if name.startswith("params:")}
    found = unread(parameters, read | set(loader.named_elsewhere()))
    if found is not None:
        path, known = found
        sentence = f"{loader.source(path, root)}: {'.'.join(path)}: nothing reads this key; {nearest(path[-1], known)}"
        raise UserError(sentence if sentence.endswith("?") else f"{sentence}.")


@contextmanager
def _all_pipelines() -> Iterator[dict[str, Pipeline]]:
    """Every registered pipeline. Afterwards those that the command asked for are the registered ones again."""
    asked = pipelines._requested_pipelines
    pipelines.set_requested(None)
    try:
        yield dict(pipelines)
    finally:
        pipelines.set_requested(asked)


def stages_of(checked: Mapping[str, Any]) -> Iterator[tuple[str, StageConfig]]:
    """Every stage among the typed sections, those inside an ablation or a replicate too, with its key."""
    training = sys.modules.get("hypersd_pipeline.training.config")
    if training is None:  # where it was not imported, there is no stage
        return
    for key, value in checked.items():
        if isinstance(value, training.StageConfig):
            yield key, value
        elif isinstance(value, BaseModel):
            yield from stages_of({f"{key}.{name}": getattr(value, name) for name in type(value).model_fields})
        elif isinstance(value, dict):
            yield from stages_of({f"{key}.{name}": inner for name, inner in value.items()})


def _check_stages(checked: Mapping[str, Any], loader: AbstractConfigLoader, root: Path) -> None:
    """Raises UserError for a stage whose name and segments differ, whose solver's grid misses a boundary, or that is the first and asks for
    a previous one.
    """
    for key, stage in stages_of(checked):
        problem = _stage_problem(key, stage)
        if problem is not None:
            path = [*key.split("."), "terms"]
            file = _defining_file([*path, *problem.split(":")[0].split(".")], loader, root)
            raise UserError(f"{file}: {'.'.join(path)}.{problem}.")


def _check_shares(checked: Mapping[str, BaseModel], loader: AbstractConfigLoader, root: Path) -> None:
    """Raises UserError for a stage whose batches the processes of ``compute`` cannot share, inside an experiment too."""
    if "compute" not in checked:
        return
    from hypersd_pipeline.recipes.stage import shared

    compute = checked["compute"]
    for key, stage in stages_of(checked):
        try:
            shared(stage, compute.nodes * compute.here)  # type: ignore[attr-defined]
        except UserError as error:
            path = [*key.split("."), *str(error).partition(":")[0].partition(" ")[0].split(".")[1:]]
            raise UserError(f"{_defining_file(path, loader, root)}: {key}{str(error).removeprefix('stage')}") from error


def _stage_problem(key: str, stage: StageConfig) -> str | None:
    """What is wrong with a stage's consistency term. The rest of the sentence after ``terms.``."""
    from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig

    consistency, named = stage.consistency, _SEGMENTS.fullmatch(key)
    if consistency is None:
        needed = named and not isinstance(stage, OneStepConfig | FeedbackConfig)
        return "consistency: a distillation stage needs this term with a weight above 0; add it" if needed else None
    if named and consistency.segments != int(named["k"]):
        return f"consistency.segments: is {consistency.segments}, but the stage is named k{named['k']}; use {named['k']}"
    if consistency.solver_points % consistency.segments:
        return (
            f"consistency.solver_points: {consistency.solver_points} is no multiple of segments: {consistency.segments}, "
            f"so that the solver would miss their boundaries; use a multiple, such as {5 * consistency.segments}"
        )
    if consistency.teacher == "previous_stage" and consistency.segments == 8:
        return "consistency.teacher: previous_stage needs a stage before this one; use base for the first stage"
    return None


def _check_data(checked: Mapping[str, Any]) -> None:
    """Raises UserError for a stage whose terms need images or instance masks that the data cannot have, before any stage is trained."""
    data = checked.get("data")
    if data is None:
        return
    _check_buckets(data, checked)
    if data.source.kind in ("twemoji", "coco"):
        return
    for key, stage in stages_of(checked):
        if data.source.kind == "prompts" and stage.consistency is not None:
            name = next(name for name, term in stage.terms.items() if term is stage.consistency)
            raise UserError(f"{key}.terms.{name}: a data source of kind 'prompts' has no images; set the term to null or use another kind.")
        segmenter = getattr(stage, "segmenter", None)
        if segmenter is not None:
            name = next(name for name, term in stage.terms.items() if term is segmenter)
            raise UserError(
                f"{key}.terms.{name}: a data source of kind '{data.source.kind}' has no instance masks; set it to null or use kind 'coco'."
            )


def _check_buckets(data: Any, checked: Mapping[str, Any]) -> None:
    """Raises UserError for a stage whose terms need square images, where ``data.buckets`` makes others."""
    for key, stage in stages_of(checked) if data.buckets else ():
        for name, term in stage.active().items():
            if what := {"regression": "stored pairs", "perceptual": "masks"}.get(getattr(term, "kind", "")):
                raise UserError(f"{key}.terms.{name}: its {what} are square, and data.buckets has other sizes; set one of them to null.")


def _sentence(error: ValidationError, key: str, model: type[BaseModel], parameters: Any, loader: AbstractConfigLoader, root: Path) -> str:
    """The first complaint of `error` as one sentence with the key, its file and how many others there are."""
    first, *others = error.errors(include_url=False)
    path = [*key.split("."), *_walk(first["loc"], model)[0], *(["kind"] if first["type"].startswith("union_tag") else [])]
    more = f" (and {len(others)} more)" if others else ""
    sentence = f"{_defining_file(path, loader, root)}: {'.'.join(path)}: {_problem(first, model)}{more}"
    return sentence if sentence.endswith("?") else f"{sentence}."


def _problem(error: Any, model: type[BaseModel]) -> str:
    """What is wrong with a key, with the cure where it is not plain."""
    match error["type"]:
        case "extra_forbidden":
            *above, key = error["loc"]
            return f"unknown key; {nearest(str(key), sorted(getattr(_walk(above, model)[1], 'model_fields', ())))}"
        case "missing":
            return "is missing; add it"
        case "union_tag_invalid":
            return f"there is no kind '{error['ctx']['tag']}'; choose one of {error['ctx']['expected_tags']}"
        case "union_tag_not_found":
            return "it is missing; say which kind this section is"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"a section with keys is needed{_given(error)}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}{_given(error)}"


def _given(error: Any) -> str:
    """The value that was refused, where it is a single one; a whole section would hide what is wrong with it."""
    value = error["input"]
    if error["type"] == "missing" or isinstance(value, Mapping | list | tuple | BaseModel):
        return ""
    shown = repr(value)
    return f" (it is {shown if len(shown) <= 80 else shown[:80] + '...'})"


def _walk(location: Iterable[int | str], annotation: Any) -> tuple[list[str], Any]:
    """Pydantic's location of an error without the tags of unions, which are no keys of ``conf/``, and the type of what is there.

    Args:
        annotation: the outermost type.
    """
    found: list[str] = []
    for part in location:
        members = _members(annotation)
        if len(members) > 1:
            annotation = next((member for tag, member in members if tag == part), None)
        else:
            found.append(str(part))
            annotation = _below(members[0][1], part)
    return found, annotation


def _members(annotation: Any) -> list[tuple[Any, Any]]:
    """The members of a union, each with its tag. One for a type that is no union."""
    tag = next((mark.tag for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Tag)), None)
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return [found for member in get_args(annotation) if member is not NoneType for found in _members(member)]
    kind = getattr(annotation, "model_fields", {}).get("kind")
    return [(next(iter(get_args(kind.annotation)), None) if tag is None and kind is not None else tag, annotation)]


def _below(annotation: Any, part: int | str) -> Any:
    """The type of what is at ``part`` of a model, mapping or sequence."""
    if field := getattr(annotation, "model_fields", {}).get(part):
        return field.annotation
    arguments = get_args(annotation)
    return (arguments[1] if get_origin(annotation) is dict else arguments[0]) if arguments else None


def _defining_file(path: list[str], loader: AbstractConfigLoader, root: Path) -> str:
    """The file of ``conf/`` that sets `path`, or the nearest key above it. The run's environment overrides base.

    An environment that the run's one extends comes between the two. Where a section is ``like`` another, its own keys override.
    """
    assert isinstance(loader, ProjectConfigLoader)  # settings.CONFIG_LOADER_CLASS
    numbers = [i for i, part in enumerate(path) if part.isdigit()]  # a list is set as a whole
    return loader.source(path[: numbers[0]] if numbers else path, root)


def check_catalog(loader: AbstractConfigLoader) -> None:
    """Raises UserError for an entry of the catalog that is no section, or has no ``type`` that there is."""
    try:
        catalog = loader["catalog"]
    except MissingConfigException:
        return
    assert isinstance(loader, ProjectConfigLoader)  # settings.CONFIG_LOADER_CLASS
    for name, entry in catalog.items():
        if not isinstance(entry, Mapping):
            raise UserError(f"{loader.place('catalog', name)}: {name}: is no section with type and filepath; write one.")
        if not isinstance(entry.get("type"), str):
            raise UserError(f"{loader.place('catalog', name)}: {name}: has no type; add one, such as `type: pandas.CSVDataset`.")


def check_tracking(loader: AbstractConfigLoader) -> None:
    """Raises UserError for a key of ``mlflow.yml`` that is unknown or has a value of another kind."""
    from kedro_mlflow.config.kedro_mlflow_config import KedroMlflowConfig

    try:
        given = loader["mlflow"]
    except MissingConfigException:
        return
    assert isinstance(loader, ProjectConfigLoader)  # settings.CONFIG_LOADER_CLASS
    try:
        KedroMlflowConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"]]
        raise UserError(
            f"{loader.place('mlflow', *path)}: {'.'.join(path)}: {_problem(first, KedroMlflowConfig)}".rstrip(".") + "."
        ) from error


def check_datasets(pipeline: Pipeline, catalog: CatalogProtocol, loader: AbstractConfigLoader | None = None) -> None:
    """Raises UserError for a dataset of `pipeline` that cannot be made of its entry in the catalog."""
    for name in sorted(pipeline.datasets()):
        try:
            if name in catalog:
                catalog.get(name)
        except DatasetError as error:
            told = " ".join(str(error.__cause__ or error).split())[:200].rstrip(".")
            where = loader.place("catalog", name) if isinstance(loader, ProjectConfigLoader) else "catalog"
            raise UserError(f"{where}: '{name}' cannot be made of its entry ({told}); correct the entry in the catalog's files.") from error


def check_inputs(pipeline: Pipeline, catalog: CatalogProtocol, env: str | None = None) -> None:
    """Check that what `pipeline` reads and does not make itself is there. Each environment (`env`) has its own data folder.

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
            raise UserError(f"'{name}'{f' ({where})' if where else ''} is missing; {_cure(name, env)}.")
    for name in sorted(_named_loras(pipeline, catalog)):
        if not catalog.exists(name):
            where = getattr(catalog.get(name), "_filepath", None)
            raise UserError(
                f"arena: '{name}' ({where}) is missing; {_cure(name, env)}, or leave it out: --params arena.shown.{name[5:]}=null."
            )


def _named_loras(pipeline: Pipeline, catalog: CatalogProtocol) -> list[str]:
    """The LoRAs that the arena's parameters name: they are no inputs of its nodes."""
    arena = catalog.load("params:arena") if "params:arena" in pipeline.inputs() and "params:arena" in catalog else None
    return [f"lora_{name}" for name in arena.loras()] if arena is not None else []


def check_models(pipeline: Pipeline, catalog: CatalogProtocol) -> None:
    """Check the teacher, the LoRAs and the judges that `pipeline` reads, before it computes anything. The teacher comes first.

    Raises:
        UserError: naming the key or the file, and the cure. What the run itself makes is not looked for.
    """
    if pipeline.all_outputs() & {"rehearsal_table", "plan_table"}:  # which need no weights
        return
    typed = {
        name.removeprefix("params:"): catalog.load(name)
        for name in sorted(pipeline.inputs())
        if name.startswith("params:") and name in catalog
    }
    if isinstance(typed.get("teacher"), BaseModel):
        _check_teacher(typed, pipeline, catalog)
    check_judges(pipeline, typed)


def _check_teacher(typed: Mapping[str, Any], pipeline: Pipeline, catalog: CatalogProtocol) -> None:
    from hypersd_pipeline.experiments.cells import AblationConfig, plan
    from hypersd_pipeline.metrics.config import EvaluationConfig
    from hypersd_pipeline.models.one_step import check_network
    from hypersd_pipeline.models.teacher_check import check_teacher

    checked = check_teacher(typed["teacher"])
    process = checked.teacher.process
    for key, stage in stages_of(typed):
        try:
            stage.check(process)
        except UserError as error:
            raise UserError(f"{key}{str(error).removeprefix('stage')}") from error
        checked.check_targets(key, stage.lora.target_modules)
        _check_precision(key, stage, typed["teacher"])
    for config in typed.values():
        if isinstance(config, EvaluationConfig):
            config.check(process.num_train_timesteps)
        if isinstance(config, AblationConfig):
            if (config.one_step_timestep or 0) > process.last_timestep:
                raise UserError(
                    f"ablation.one_step_timestep is {config.one_step_timestep}, but the teacher's end at {process.last_timestep}; lower it."
                )
            plan(config)
    if (arena := typed.get("arena")) is not None:
        arena.check(process.num_train_timesteps)
    if "compatibility" in typed:
        typed["compatibility"].check(checked.teacher)
    for name in sorted({*pipeline.inputs(), *_named_loras(pipeline, catalog)}):
        dataset = catalog.get(name) if name in catalog else None
        if isinstance(dataset, LoRADataset):
            dataset.check(checked.shapes, process.num_train_timesteps)
        elif dataset is not None and name == "one_step_unet":
            check_network(Path(dataset._filepath), checked.shapes, process.num_train_timesteps)


def _check_precision(key: str, stage: StageConfig, teacher: Any) -> None:
    """Raises UserError for a teacher in float16 that a CPU would have to multiply with bfloat16."""
    import torch

    if teacher.dtype == "float16" and stage.loop.mixed_precision == "bf16" and not torch.cuda.is_available():
        raise UserError(
            f"{key}.loop.mixed_precision: bf16 on a CPU cannot be used with teacher.dtype float16; use bfloat16 or float32 for the teacher."
        )


def check_room(pipeline: Pipeline, catalog: CatalogProtocol) -> None:
    """Check that the stages that `pipeline` trains fit into the memory, where the teacher is large. ``plan.refuse: false`` leaves it out.

    Raises:
        UserError: naming the stage, what it needs and what there is, and the cure.
    """
    from hypersd_pipeline.metrics.config import EvaluationConfig
    from hypersd_pipeline.models.teacher import TeacherConfig
    from hypersd_pipeline.pipelines.nodes import STAGES
    from hypersd_pipeline.recipes.plan.hardware import PlanConfig
    from hypersd_pipeline.training.config import StageConfig
    from hypersd_pipeline.training.distributed import ComputeConfig

    names = {node.name for node in pipeline.nodes}
    keys = [key for key in STAGES if f"{key}.train" in names]
    if not keys or "params:plan" not in catalog:
        return

    def typed(section: str, model: Any) -> Any:
        value = catalog.load(f"params:{section}")
        return value if isinstance(value, BaseModel) else model.model_validate(value)

    plan, teacher = typed("plan", PlanConfig), typed("teacher", TeacherConfig)
    if not plan.refuse or teacher.source == "shipped":
        return
    from hypersd_pipeline.recipes.plan.ask import require_room

    stages = {key: typed(f"{key}.stage", StageConfig) for key in keys}
    require_room(plan, teacher, typed("compute", ComputeConfig), typed("evaluation", EvaluationConfig).batch_size, stages)


def check_judges(pipeline: Pipeline, typed: Mapping[str, Any]) -> None:
    """Check the weights of every reward, segmenter and metric of `pipeline`, before stages that may train for days.

    Raises:
        UserError: naming the stage, the file and the cure. Judges that the run itself makes are not looked for.
    """
    from hypersd_pipeline.metrics.config import EvaluationConfig

    for config in typed.values():
        if isinstance(config, EvaluationConfig):
            config.check_judges()
    if pipeline.all_outputs() & {"text_image_reward", "held_out_reward", "segmentation_model"}:
        return
    for key, stage in stages_of(typed):
        try:
            stage.check_judges()
        except UserError as error:
            raise UserError(f"{key}: {error}") from error


def check_starts(pipeline: Pipeline, catalog: CatalogProtocol) -> None:
    """Check what each stage starts from, before anything is trained: the LoRA of the stage before, or one of the user's own.

    Raises:
        UserError: there is no file at ``stage.start``, a stage that is not the first one has it, or the first one asks for a
            ``previous_stage``.
    """
    from hypersd_pipeline.recipes.distil import check_consistency
    from hypersd_pipeline.training.config import FeedbackConfig, OneStepConfig, StageConfig

    for node in pipeline.nodes:
        for name in node.inputs:
            stage = catalog.load(name) if name.endswith(".stage") and name in catalog else None
            if not isinstance(stage, StageConfig):
                continue
            key = name.removeprefix("params:")
            before = next((other for other in node.inputs if other.startswith("lora_") or other.endswith(".start")), None)
            if stage.start is not None:
                _check_own_start(key, stage.start, before, "latents" in node.inputs)
            if before is None and stage.consistency is not None and not isinstance(stage, OneStepConfig | FeedbackConfig):
                try:
                    check_consistency(stage, has_previous=False)
                except UserError as error:
                    raise UserError(f"{key}{str(error).removeprefix('stage')}") from error


def _check_own_start(key: str, start: Path, before: str | None, trains: bool) -> None:
    from hypersd_pipeline.models.user_lora import user_lora_file

    if before is not None or not trains:
        reason = "is no first stage" if before is None else f"starts from {before}"
        raise UserError(f"{key}.start: this stage {reason}; set start for the first one only, such as tscd_k8.stage.start.")
    try:
        user_lora_file(start)
    except UserError as error:
        raise UserError(f"{key}.{error}") from error


def _cure(dataset: str, env: str | None) -> str:
    """The command that makes `dataset` in the data folder of `env`: the smallest registered pipeline with it among its outputs."""
    pipelines.set_requested(None)
    makers = {name: made for name, made in pipelines.items() if dataset in made.all_outputs() and name != "__default__"}
    if not makers:
        return "put it there or correct its filepath in the catalog"
    smallest = min(makers, key=lambda name: len(makers[name].nodes))
    return f"run `kedro run{f' --env {env}' if env else ''} --pipelines {smallest} --to-outputs {dataset}` first"
