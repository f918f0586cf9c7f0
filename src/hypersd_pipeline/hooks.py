"""Kedro hooks: checks before a run starts, MLflow runs with one child per stage, and DVC's record of a finished run."""

from __future__ import annotations

import getpass
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import mlflow
from kedro.config import AbstractConfigLoader, MissingConfigException
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro_mlflow.config.kedro_mlflow_config import KedroMlflowConfig
from pydantic import BaseModel, ValidationError

from hypersd_pipeline import checks
from hypersd_pipeline.cluster import ClusterConfig, in_job, read_cluster, submit
from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.dvc_stages import stages_file, write_stages
from hypersd_pipeline.errors import UserError
from hypersd_pipeline.files import fingerprint, lock
from hypersd_pipeline.io import tracking
from hypersd_pipeline.io.images import ImageDataset
from hypersd_pipeline.io.journal import (
    PIPELINE,
    Delivery,
    Journal,
    Sender,
    end_shared_run,
    folder_id,
    milliseconds,
    send_left,
    shared_run,
)
from hypersd_pipeline.io.machine import MachineMonitor, seconds_between
from hypersd_pipeline.io.metrics import MetricsDataset
from hypersd_pipeline.io.mlflow_store import connect, reason, this_process
from hypersd_pipeline.logs import prepare_logs, set_subject
from hypersd_pipeline.masking import masked
from hypersd_pipeline.order import by_stage

logger = logging.getLogger(__name__)

_LONGEST_NAME, _MOST = 200, 12
"""Characters of a run's name, and metrics of the pipeline's own run."""
NOTE_TAG = "mlflow.note.content"
"""What MLflow shows as a run's description."""
_FILTERS = ("tags", "from_nodes", "to_nodes", "node_names", "from_inputs", "to_outputs", "namespaces", "only_missing_outputs")


class ChecksHook:
    """Refuses a run that cannot work before any node runs and before anything is recorded."""

    def __init__(self) -> None:
        self._loader: AbstractConfigLoader | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Raises UserError for a file of ``conf/`` that cannot be read, and for a value in it that is refused."""
        self._loader = context.config_loader
        checks.check_parameters(context.config_loader, context.project_path)
        checks.check_catalog(context.config_loader)
        checks.check_tracking(context.config_loader)

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        """Raises UserError for a dataset, an input file, a teacher or a judge that cannot be used. What is cheap is checked first."""
        checks.check_runner(run_params.get("runner"))
        checks.check_datasets(pipeline, catalog, self._loader)
        checks.check_inputs(pipeline, catalog, run_params["env"])
        checks.check_starts(pipeline, catalog)
        checks.check_models(pipeline, catalog)
        checks.check_room(pipeline, catalog)


class ClusterHook:
    """Runs a checked `kedro run` as a job of the cluster that cluster.yml names, and ends this process as the job ends."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Read cluster.yml. Raises UserError for a key or value that it cannot have."""
        try:
            self._config = read_cluster(context.config_loader["cluster"])
        except MissingConfigException:
            self._config = ClusterConfig()
        self._folder, self._root = _data_folder(context, "08_reporting/jobs"), Path(context.project_path)
        self._nodes = int(dict(context.params.get("compute") or {}).get("nodes", 1))  # a model, or a plain mapping

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any]) -> None:
        """Submit. Left out inside a job, and for a run that Python code started."""
        command = click.get_current_context(silent=True)
        if self._config.scheduler is None or in_job(os.environ) or command is None or command.info_name != "run":
            return
        stage = os.environ.get("DVC_STAGE", "").rpartition(":")[2]
        names = run_params["pipeline_names"] or ["full_distill"]
        log = self._folder / f"{datetime.now():%Y%m%d-%H%M%S}-{stage or '-'.join(names)}.log"
        job = self._config.job_of(stage or None, names)
        raise click.exceptions.Exit(submit(job, self._nodes, sys.argv[1:], run_params["env"], self._root, log))


class OrderHook:
    """Lets a run finish a stage before it begins another, so that the metrics of a stage are there before the next one trains."""

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """The runner walks through `nodes`."""
        pipeline.nodes = by_stage(pipeline)


class LogHook:
    """Lets each line of the log name its stage and the model that the stage makes."""

    def __init__(self) -> None:
        self._models: dict[str, str] = {}

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline) -> None:
        """Find the model that each stage makes: the first of its outputs that is one."""
        self._models = {}
        for node in pipeline.nodes:
            made = next((name for name in node.outputs if name.startswith("lora_") or name == "one_step_unet"), None)
            if node.namespace and made:
                self._models.setdefault(node.namespace, made)

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """From here on lines are about this node: its stage, or its name where it belongs to none."""
        stage = node.namespace or node.name
        model = self._models.get(stage, stage)
        set_subject(stage if model == stage else f"{stage}: {model}")

    @hook_impl
    def after_pipeline_run(self) -> None:
        """The last lines are about the run."""
        set_subject("")

    @hook_impl
    def on_pipeline_error(self) -> None:
        """The same after an error."""
        set_subject("")


class LockHook:
    """Two runs never make the same thing at once: the node that writes it is locked in the data folder of the environment.

    Another run's stage is refused at once. What is short and shared by pipelines, such as the reference of an evaluation, is waited for.
    """

    def __init__(self) -> None:
        self._held = ExitStack()

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Find the data folder."""
        self._folder = _data_folder(context, ".locks")

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Raises UserError naming the process that runs this node with the same data folder."""
        self._held.close()  # what the node before wrote is saved by now
        self._held.enter_context(lock(self._folder / node.name, node.name, seconds=0 if node.namespace else 60))

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Let others in."""
        self._held.close()

    @hook_impl
    def on_pipeline_error(self) -> None:
        """Let others in."""
        self._held.close()


class ResultsHook:
    """The last lines of a run: where the results are, how the models compare, and what to do next."""

    @hook_impl
    def after_pipeline_run(self, pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        """Log them for a run that made the table of results, or compared runs."""
        made = pipeline.all_outputs()
        if {"comparison_page", "comparison_verdict"} <= made:
            verdict, page = catalog.load("comparison_verdict"), getattr(catalog.get("comparison_page"), "_filepath", "comparison_page")
            logger.info("%s The page is %s.", " ".join(verdict.split()), _short(Path(str(page))))
        if not {"results", "results_table", "results_grid"} <= made:
            return
        from hypersd_pipeline.evaluation.results import last_words

        compared = last_words(catalog.load("results"))
        paths = [str(getattr(catalog.get(name), "_filepath", name)) for name in ("results_table", "results_grid")]
        logger.info("Results: %s and %s.%s", *paths, f" {compared}" if compared else "")
        lora = next((name for name in ("lora_unified", "lora_k4") if name in made), None)
        if lora is not None:
            logger.info("Next: sample from %s as its README.md says.", getattr(catalog.get(lora), "_filepath", lora))


class TrackingHook:
    """One MLflow run per pipeline run, with a nested run per namespace, that is per training stage.

    It takes the place of kedro-mlflow's hook and reads the same mlflow.yml. What is recorded goes into a journal, which a thread sends:
    see `io.journal`. An interrupted pipeline run that is started again continues its MLflow runs. Datasets with
    ``metadata: {mlflow: artifact}`` are uploaded, images among them are shown as such, ``{mlflow: note}`` is the run's description.
    `MetricsDataset` becomes metrics: of the stage, or outside of stages of a nested run that ``{prefix: teacher}`` names. The pipeline's
    own run has a dozen at most, with their direction in the name. Parameters are flattened.
    """

    def __init__(self) -> None:
        self._run: _TrackedRun | None = None
        self._data_hash: str | None = None
        self._catalog: CatalogProtocol | None = None

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Read mlflow.yml. Nothing is connected to yet. Raises UserError for a key or value that it cannot have."""
        prepare_logs()
        self._config, self._folder = _mlflow_config(context), _journals(context)
        context.__setattr__("mlflow", self._config)  # for the commands of kedro-mlflow

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        """Begin the run. Raises UserError if the server cannot be reached, unless HYPERSD_TRACKING=offline."""
        fail_open_runs()  # an interrupt in a notebook reaches no hook
        self._run, self._data_hash, self._catalog = None, None, catalog
        self._seconds = self._memory = 0.0
        disabled = self._config.tracking.disable_tracking.pipelines
        if all(name in disabled for name in run_params["pipeline_names"] or ["__default__"]):
            return
        self._run = _TrackedRun(self._config, self._folder, run_params, _resolved(pipeline, catalog))

    @hook_impl
    def after_dataset_loaded(self, dataset_name: str, data: Any) -> None:
        """Record the training data: its content hash as a tag, and the data set as an input."""
        key = getattr(data, "key", None)
        if type(data).__name__ == "LatentCache" and key and self._run:
            self._data_hash = str(key)
            self._run.recorder.tags({"data_hash": self._data_hash})
            self._run.recorder.dataset(dataset_name, self._data_hash, json.dumps({"folder": str(getattr(data, "path", ""))}))

    @hook_impl
    def before_node_run(self, node: Node, inputs: dict[str, Any]) -> None:
        """Record the parameters in the pipeline's run and in the stage's own, which becomes the active one."""
        if self._run is None:
            return
        recorder, stage = self._run.recorder, node.namespace
        if recorder.stage:  # of the node before, whose outputs are saved by now
            recorder.close("FINISHED")
        given = {name.removeprefix("params:"): _plain(value) for name, value in inputs.items() if name.startswith("params:")}
        recorder.parameters(given, in_pipeline=True)
        if stage:
            recorder.open(stage, {tracking.STAGE_TAG: stage, **({"data_hash": self._data_hash} if self._data_hash else {})})
            recorder.parameters({name.removeprefix(f"{stage}."): value for name, value in given.items()})

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        """Record metrics and artifacts."""
        if self._run is None or self._catalog is None:
            return
        dataset = self._catalog.get(dataset_name)
        metadata = getattr(dataset, "metadata", None) or {}
        if isinstance(dataset, MetricsDataset):
            self._record_metrics(dataset_name, data, metadata)
        if metadata.get("mlflow") == "artifact":
            path = str(Path(dataset._filepath).absolute())  # type: ignore[union-attr]
            self._run.recorder.artifact(path, dataset_name)
            if isinstance(dataset, ImageDataset):
                self._run.recorder.image(path, dataset_name)
        elif metadata.get("mlflow") == "note":
            self._run.recorder.tags({NOTE_TAG: str(data)})

    def _record_metrics(self, name: str, data: dict[str, Any], metadata: dict[str, Any]) -> None:
        """All in the run of the stage, or where it belongs to none in a run of their own. In the pipeline's run the few to compare by."""
        assert self._run is not None
        recorder = self._run.recorder
        if metadata.get("mlflow") == "headline":
            recorder.headline(tracking.without_intervals(data))
        elif recorder.stage or ("prefix" not in metadata and len(tracking.flatten(data)) <= _MOST):
            tracking.log_final(data)
        else:
            with tracking.child_run(metadata.get("prefix", name), {}):
                tracking.log_final(data)
        if name == "teacher_metrics" or name.startswith("metrics_"):
            from hypersd_pipeline.evaluation.results import at_a_glance

            recorder.headline(tracking.finite(at_a_glance("teacher" if name == "teacher_metrics" else name.removeprefix("metrics_"), data)))
        elif name == "results":
            from hypersd_pipeline.evaluation.results import last_words

            recorder.tags({NOTE_TAG: last_words(data) or "There is nothing to compare in this run."})
        elif "train_seconds" in data and not self._run.shared:
            self._seconds += data["train_seconds"]
            self._memory = max(self._memory, data.get("peak_memory_mb") or 0.0)
            cost = {"train_seconds": self._seconds, **({"peak_memory_mb": self._memory} if self._memory else {})}
            recorder.headline(tracking.finite({f"lower is better/{key}": value for key, value in cost.items()}))

    @hook_impl
    def after_pipeline_run(self, pipeline: Pipeline) -> None:
        """Close the runs as FINISHED, and say where they are."""
        if self._run:
            self._run.finish("FINISHED")
            if "results" in pipeline.all_outputs():
                end_shared_run(self._folder)

    @hook_impl
    def on_pipeline_error(self, error: Exception) -> None:
        """Close the runs as FAILED, with the error's sentence as a tag."""
        if self._run:
            self._run.recorder.tags({"error": f"{type(error).__name__}: {error}"[:500]})
            self._run.finish("FAILED")


class _TrackedRun:
    """What is recorded of one pipeline run, from the check of the server to the sentence that says where the results are."""

    def __init__(self, config: KedroMlflowConfig, folder: Path, run_params: dict[str, Any], parameters: dict[str, Any]) -> None:
        root, env = Path(run_params["project_path"]), run_params["env"]
        uri, options, active = config.server.mlflow_tracking_uri or "", config.tracking, mlflow.active_run()
        self._env, self._keep_open = env, active is not None  # a run that Python code opened around the session is its own to close
        if active:
            uri = mlflow.get_tracking_uri()
        seconds = seconds_between()
        given = active.info.run_id if active else os.environ.get("MLFLOW_RUN_ID") or options.run.id
        self._store = None if _is_offline() else connect(uri, options.experiment, given)
        chosen = {name: run_params.get(name) for name in ("pipeline_names", *_FILTERS)}
        try:
            data, shared = folder_id(folder), shared_run(folder, os.environ)
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}), so make room there or correct its permissions.") from error
        self._name = options.run.name or _run_name(run_params, shared)
        key = [data, shared] if shared else [self._name, chosen, env, parameters, data]
        begun = {
            "open": self._name,
            "key": fingerprint(options.experiment.name, *key),
            "shared": bool(shared),
            "given": given,
            "process": this_process(),
            "time": milliseconds(),
            "tags": {name: str(value) for name, value in run_params.items() if value}
            | _provenance(root, env)
            | ({"pipeline_id": shared} if shared else {}),
        }
        self.recorder = tracking.recorder = tracking.Recorder(Journal(folder, begun))
        self._sender = Sender(self.recorder.journal, self._store) if self._store else None
        self.shared = bool(shared)
        self._monitor = MachineMonitor(self.recorder.headline, seconds) if seconds else None
        _open_runs.append(self)

    def finish(self, status: str, seconds: float = 30.0) -> None:
        """Close the runs, send the rest, and say where the results are and what to do next."""
        if self not in _open_runs:
            return
        _open_runs.remove(self)
        tracking.recorder = None
        if self._monitor:
            self._monitor.finish()
        self.recorder.close_all(status, parent=not self._keep_open)
        journal, again = self.recorder.journal, "" if status == "FINISHED" else "The same command continues this run."
        send = f"`kedro tracking send{f' --env {self._env}' if self._env else ''}`"
        if self._sender is None:
            journal.close()
            logger.warning(
                "Tracking is offline: this run is recorded in %s, which the next online run or %s sends.", _short(journal.path), send
            )
        elif not self._sender.finish(seconds):
            failure = self._sender.failure
            logger.warning(
                "MLflow could not take everything (%s): this run is recorded in %s, which the next run or %s sends.",
                reason(failure) if failure else f"not done within {seconds:.0f} seconds",
                _short(journal.path),
                send,
            )
        else:
            self._say_where(self._sender.delivery)
        if again:
            logger.info(again)

    def _say_where(self, delivery: Delivery) -> None:
        if delivery.refused:
            refused = _short(delivery.path.with_suffix(".refused"))
            logger.warning("MLflow refused %d entries of this run, which are kept in %s.", delivery.refused, refused)
        run_id = delivery.runs.get(PIPELINE)
        if run_id and self._store:
            try:
                logger.info("This run is '%s' in MLflow: %s", self._name, self._store.page(run_id))
            except Exception as error:  # gone since
                logger.debug("%r", error)


_open_runs: list[_TrackedRun] = []


def fail_open_runs() -> None:
    """Close what this process still records as FAILED (an interrupt reaches no Kedro hook)."""
    for run in list(_open_runs):
        run.finish("FAILED", seconds=10.0)


def send_journals(context: KedroContext) -> str:
    """Send what earlier runs left, and say so.

    Raises:
        UserError: the server cannot be reached, or takes some of it not.
    """
    config: KedroMlflowConfig = context.mlflow  # type: ignore[attr-defined]
    folder = _journals(context)
    if not list(folder.glob("*.jsonl")):
        return f"There is nothing to send in {_short(folder)}."
    store = connect(config.server.mlflow_tracking_uri or "", config.tracking.experiment)
    try:
        sent, refused = send_left(folder, store)
    except Exception as error:
        raise UserError(f"MLflow does not answer any more ({reason(error)}), so try again later.") from error
    left = len(list(folder.glob("*.jsonl")))
    said = [f"Sent {sent} journal{'s' * (sent != 1)} to {masked(store.uri)}."]
    if left:
        said.append(f"{left} left in {_short(folder)} belong to runs that go on, or cannot be sent now.")
    if refused:
        said.append(f"MLflow refused {refused} entries, which are kept there in files named .refused.")
    return " ".join(said)


def _mlflow_config(context: KedroContext) -> KedroMlflowConfig:
    try:
        config = KedroMlflowConfig.model_validate(dict(context.config_loader["mlflow"]))
    except MissingConfigException:
        config = KedroMlflowConfig()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"mlflow.yml: {'.'.join(map(str, first['loc']))}: {first['msg']}, so correct it or remove it.") from error
    root, server, options = Path(context.project_path), config.server, config.tracking.experiment.create_experiment_kwargs
    server.mlflow_tracking_uri = _address(root, server.mlflow_tracking_uri or mlflow.get_tracking_uri())
    if options.artifact_location:
        options.artifact_location = _address(root, options.artifact_location)
    config._export_credentials(context)
    config._register_request_header_provider(context)
    return config


def _address(root: Path, given: str) -> str:
    """A store's address; a path is relative to the project."""
    return given if ":" in given or given.startswith("databricks") else (root / given).as_uri()


def _journals(context: KedroContext) -> Path:
    return _data_folder(context, "08_reporting/tracking")


def _data_folder(context: KedroContext, below: str) -> Path:
    """A folder below the environment's own data folder."""
    loader = context.config_loader
    folder = loader.data_folder(below) if isinstance(loader, ProjectConfigLoader) else f"data/{below}"
    return Path(context.project_path) / folder


def _is_offline() -> bool:
    """Whether HYPERSD_TRACKING asks to record in files only."""
    choice = os.environ.get("HYPERSD_TRACKING") or "online"
    if choice not in ("online", "offline"):
        raise UserError(f"HYPERSD_TRACKING: '{choice}' is no choice, so set it to online or offline, or unset it.")
    return choice == "offline"


def _resolved(pipeline: Pipeline, catalog: CatalogProtocol) -> dict[str, Any]:
    """The parameters that `pipeline` reads."""
    names = [name for name in sorted(pipeline.inputs()) if name.startswith("params:") or name == "parameters"]
    return {name: _plain(catalog.load(name)) for name in names}


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


class DvcHook:
    """Writes ``dvc.lock`` after a full run with the base configuration, so that ``dvc repro`` then has nothing to do.

    Left out where DVC itself started the run, outside a git or DVC checkout, and for a run that no dvc.yaml describes: an environment that
    `kedro repro` has not made one for, a configuration from elsewhere or with local overrides, extra parameters, a part of the pipeline,
    or code and configuration that changed while it ran.
    """

    def __init__(self) -> None:
        self._loader: AbstractConfigLoader | None = None
        self._began_with: list[tuple[str, int, int]] = []

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Remember where the configuration comes from."""
        self._loader = context.config_loader

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any]) -> None:
        """Remember the state of code and configuration."""
        self._began_with = _sources(Path(run_params["project_path"]))

    @hook_impl(trylast=True)
    def after_pipeline_run(self, run_params: dict[str, Any]) -> None:
        """Run ``dvc commit``. A failure is a warning, since the results themselves are safe."""
        root = Path(run_params["project_path"])
        loader = self._loader
        if (
            not _described_by_dvc(run_params, root)
            or not isinstance(loader, ProjectConfigLoader)
            or Path(loader.conf_source) != root / "conf"
        ):
            return
        if self._began_with != _sources(root):
            logger.warning(
                "dvc.lock was not updated: code or configuration changed during the run; `dvc repro` will run what that concerns."
            )
            return
        dvc = shutil.which("dvc", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
        if dvc is None:
            return
        file = write_stages(root, loader).relative_to(root)
        done = subprocess.run([dvc, "commit", "--force", "--quiet", str(file)], cwd=root, capture_output=True, text=True)
        if done.returncode:
            logger.warning("dvc.lock was not updated: %s", done.stderr.strip().splitlines()[-1:] or done.returncode)
        else:
            again = "dvc repro" if file.parent == Path() else f"kedro repro --env {run_params['env']}"
            logger.info("%s updated: `%s` has nothing to do until code, data or parameters change.", file.with_name("dvc.lock"), again)


def _sources(root: Path) -> list[tuple[str, int, int]]:
    """Path, time and size of everything that dvc.yaml's code and parameter dependencies can name."""
    files = [*(root / "src").rglob("*.py"), *(root / "conf").rglob("*.yml"), root / "dvc.yaml"]
    return sorted((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())


def _described_by_dvc(run_params: dict[str, Any], root: Path) -> bool:
    whole = (run_params["pipeline_names"] or ["__default__"]) in (["__default__"], ["full_distill"])
    local = run_params["env"] in (None, "local")
    overridden = local and any(file.suffix in (".yml", ".yaml", ".json") for file in (root / "conf" / "local").rglob("*"))
    return (
        whole
        and stages_file(root, run_params["env"]).is_file()
        and not overridden
        and not any(run_params.get(name) for name in (*_FILTERS, "runtime_params"))
        and "DVC_ROOT" not in os.environ
        and all((root / name).exists() for name in (".git", ".dvc", "dvc.yaml"))
    )


def _run_name(run_params: dict[str, Any], shared: str | None) -> str:
    """Such as ``full_distill``, ``tscd tscd_k2 (smoke)``: pipelines, namespaces, and the environment unless it is the default.

    What was changed on the command line follows: ``tscd tscd.loop.steps=50``. A run that several commands share is called by its id.
    """
    names = [name.replace("__default__", "full_distill") for name in run_params["pipeline_names"] or ["__default__"]]
    env = run_params["env"]
    own = [shared] if shared else [*names, *(run_params["namespaces"] or ())]
    given = {} if shared else tracking.flatten(run_params.get("runtime_params") or {}, sep=".", lists=False)
    changed = [f"{name}={str(value).replace(chr(39), '')}" for name, value in given.items()]
    return " ".join([*own, *([f"({env})"] if env not in (None, "local", "base") else []), *changed])[:_LONGEST_NAME]


def _git(root: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _provenance(root: Path, env: str | None) -> dict[str, str]:
    """Tags that tell where a run comes from: commit, uncommitted changes (results aside), environment, versions, hardware."""
    import torch

    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock", ":!data")
    return {
        "git_commit": _git(root, "rev-parse", "HEAD") or "none",
        "git_dirty": "unknown" if changes is None else str(bool(changes)).lower(),
        "environment": env or "local",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {os.cpu_count()}",
        "kedro_command": shlex.join(["kedro", *sys.argv[1:]]),
        # columns of MLflow's table
        "mlflow.source.name": "kedro run",
        "mlflow.source.type": "PROJECT",
        "mlflow.user": _user(),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a name for its user
        return "unknown"
