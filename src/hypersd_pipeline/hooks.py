"""Kedro hooks: checks before a run starts, MLflow runs with one child per stage, and DVC's record of a finished run."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import psutil
from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.io import CatalogProtocol
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro_mlflow.framework.hooks.mlflow_hook import MlflowHook
from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import BaseModel

from hypersd_pipeline import checks
from hypersd_pipeline.io import tracking
from hypersd_pipeline.io.metrics import MetricsDataset, MetricStream

logger = logging.getLogger(__name__)

_PROCESS_TAG = "process"


class ChecksHook:
    """Refuses a run that cannot work before any node runs and before anything is recorded."""

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Raises UserError for a parameter that its pydantic model refuses."""
        checks.check_parameters(context.config_loader, context.project_path)

    @hook_impl
    def before_pipeline_run(self, pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        """Raises UserError for a parameter, an input file or a judge's weights that are not there."""
        checks.check_inputs(pipeline, catalog)
        checks.check_judges(pipeline, catalog)


class TrackingHook(MlflowHook):
    """kedro-mlflow's hook (one MLflow run per pipeline run) with a nested run per namespace, that is per training stage.

    Children carry plain metric names (``train/loss``), equal from stage to stage and run to run; the parent has the same ones with the
    stage in front (``tscd_k4/train/loss``), so that two pipeline runs compare on one page. Datasets with ``metadata: {mlflow: artifact}``
    are uploaded, `MetricsDataset` becomes metrics (``metadata: {prefix: teacher}`` puts ``teacher/`` in front), typed parameters are
    flattened.
    """

    def __init__(self) -> None:
        super().__init__()
        self._children: dict[str, str] = {}
        self._streams: list[MetricStream] = []
        self._data_hash: str | None = None
        self._catalog: CatalogProtocol | None = None

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        """Open the parent run; runs of processes that were killed are closed as FAILED first."""
        self._children, self._streams, self._data_hash, self._catalog = {}, [], None, catalog
        self.run_id = None
        close_dead_runs(self.mlflow_config.tracking.experiment._experiment.experiment_id)
        super().before_pipeline_run(run_params, pipeline, catalog)
        if self._is_mlflow_enabled and self.run_id:
            if not self.mlflow_config.tracking.run.name:
                MlflowClient().update_run(self.run_id, name=_run_name(run_params))
            mlflow.set_tags(_provenance(Path(run_params["project_path"]), run_params["env"]))

    @hook_impl
    def after_dataset_loaded(self, data: Any, node: Node) -> None:
        """Keep the metric stream that must be flushed, and the content hash of the training data."""
        if isinstance(data, MetricStream):
            self._streams.append(data)
        key = getattr(data, "key", None)
        if type(data).__name__ == "LatentCache" and key and self.run_id:
            self._data_hash = str(key)
            MlflowClient().set_tag(self.run_id, "data_hash", self._data_hash)

    @hook_impl
    def before_node_run(self, node: Node, catalog: CatalogProtocol, inputs: dict[str, Any], is_async: bool) -> None:
        """Log the parameters in the parent run, then make the stage's own run the active one."""
        self._close_child()
        plain = {name: value.model_dump(mode="json") if isinstance(value, BaseModel) else value for name, value in inputs.items()}
        active, run_id = mlflow.active_run(), self.run_id
        if active and active.info.run_id == run_id:
            self.run_id = None  # kedro-mlflow would open the active run once more for each node
        super().before_node_run(node, catalog, plain, is_async)
        self.run_id = run_id
        if node.namespace and self._is_mlflow_enabled and mlflow.active_run():
            self._open_child(node.namespace, plain)

    @hook_impl
    def after_node_run(self) -> None:
        """Write out the curves."""
        self._flush()

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        """Send metrics and artifacts of the dataset to the active run."""
        if not mlflow.active_run() or self._catalog is None:
            return
        dataset = self._catalog.get(dataset_name)
        metadata = getattr(dataset, "metadata", None) or {}
        if isinstance(dataset, MetricsDataset):
            tracking.log_final({metadata["prefix"]: data} if "prefix" in metadata else data)
        if metadata.get("mlflow") == "artifact":
            path = Path(dataset._filepath)  # type: ignore[union-attr]
            mlflow.log_artifacts(str(path), dataset_name) if path.is_dir() else mlflow.log_artifact(str(path))

    @hook_impl
    def after_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        """Close the runs as FINISHED."""
        self._close_child()
        super().after_pipeline_run(run_params, pipeline, catalog)

    @hook_impl
    def on_pipeline_error(self, error: Exception, run_params: dict[str, Any], pipeline: Pipeline, catalog: CatalogProtocol) -> None:
        """Close the runs as FAILED, with the error's sentence as a tag."""
        self._flush()
        if self.run_id:
            MlflowClient().set_tag(self.run_id, "error", f"{type(error).__name__}: {error}"[:500])
        if mlflow.active_run():
            super().on_pipeline_error(error, run_params, pipeline, catalog)

    def _flush(self) -> None:
        streams, self._streams = self._streams, []
        for stream in streams:
            stream.flush()

    def _open_child(self, stage: str, inputs: dict[str, Any]) -> None:
        tags = {tracking.STAGE_TAG: stage, **_process_tag(), **({"data_hash": self._data_hash} if self._data_hash else {})}
        run = mlflow.start_run(run_id=self._children.get(stage), run_name=stage, nested=True, tags=tags)
        self._children[stage] = run.info.run_id
        parameters = {
            name.removeprefix("params:").removeprefix(f"{stage}."): value for name, value in inputs.items() if name.startswith("params:")
        }
        mlflow.log_params(tracking.flatten(parameters, sep="."))

    def _close_child(self) -> None:
        run = mlflow.active_run()
        if run and run.info.run_id in self._children.values():
            mlflow.end_run()


class DvcHook:
    """Writes ``dvc.lock`` after a full run with the base configuration, so that ``dvc repro`` then has nothing to do.

    Left out where DVC itself started the run, outside a git or DVC checkout, and for a run that dvc.yaml does not describe: another
    environment, a configuration from elsewhere or with local overrides, extra parameters, a part of the pipeline, or code and
    configuration that changed while it ran.
    """

    def __init__(self) -> None:
        self._conf_source: Path | None = None
        self._began_with: list[tuple[str, int, int]] = []

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Remember where the configuration comes from."""
        self._conf_source = Path(context.config_loader.conf_source)

    @hook_impl
    def before_pipeline_run(self, run_params: dict[str, Any]) -> None:
        """Remember the state of code and configuration."""
        self._began_with = _sources(Path(run_params["project_path"]))

    @hook_impl(trylast=True)
    def after_pipeline_run(self, run_params: dict[str, Any]) -> None:
        """Run ``dvc commit``; a failure is a warning, since the results themselves are safe."""
        root = Path(run_params["project_path"])
        if not _described_by_dvc(run_params, root) or self._conf_source != root / "conf":
            return
        if self._began_with != _sources(root):
            logger.warning(
                "dvc.lock was not updated: code or configuration changed during the run; `dvc repro` will run what that concerns."
            )
            return
        dvc = shutil.which("dvc", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
        if dvc is None:
            return
        done = subprocess.run([dvc, "commit", "--force", "--quiet"], cwd=root, capture_output=True, text=True)
        if done.returncode:
            logger.warning("dvc.lock was not updated: %s", done.stderr.strip().splitlines()[-1:] or done.returncode)
        else:
            logger.info("dvc.lock updated: `dvc repro` has nothing to do until code, data or parameters change.")


def _sources(root: Path) -> list[tuple[str, int, int]]:
    """Path, time and size of everything that dvc.yaml's code and parameter dependencies can name."""
    files = [*(root / "src").rglob("*.py"), *(root / "conf" / "base").glob("*"), root / "dvc.yaml"]
    return sorted((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())


def _described_by_dvc(run_params: dict[str, Any], root: Path) -> bool:
    filters = (
        *("tags", "from_nodes", "to_nodes", "node_names", "from_inputs", "to_outputs", "namespaces", "runtime_params"),
        "only_missing_outputs",
    )
    whole = (run_params["pipeline_names"] or ["__default__"]) in (["__default__"], ["full_distill"])
    local = run_params["env"] in (None, "local")
    overridden = local and any(file.suffix in (".yml", ".yaml", ".json") for file in (root / "conf" / "local").rglob("*"))
    return (
        whole
        and run_params["env"] in (None, "base", "local")
        and not overridden
        and not any(run_params.get(name) for name in filters)
        and "DVC_ROOT" not in os.environ
        and all((root / name).exists() for name in (".git", ".dvc", "dvc.yaml"))
    )


def _run_name(run_params: dict[str, Any]) -> str:
    """Such as ``full_distill``, ``tscd tscd_k2 (smoke)``: pipelines, namespaces, and the environment unless it is the default."""
    names = [name.replace("__default__", "full_distill") for name in run_params["pipeline_names"] or ["__default__"]]
    env = run_params["env"]
    return " ".join([*names, *(run_params["namespaces"] or ()), *([f"({env})"] if env not in (None, "local", "base") else [])])


def _git(root: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _provenance(root: Path, env: str | None) -> dict[str, str]:
    """Tags that tell where a run comes from: commit, uncommitted changes (dvc.lock aside), environment, versions, hardware."""
    import torch

    changes = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
    return {
        "git_commit": _git(root, "rev-parse", "HEAD") or "none",
        "git_dirty": "unknown" if changes is None else str(bool(changes)).lower(),
        "environment": env or "local",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {os.cpu_count()}",
        **_process_tag(),
    }


def _process_tag() -> dict[str, str]:
    return {_PROCESS_TAG: f"{socket.gethostname()}/{os.getpid()}/{psutil.Process().create_time():.0f}"}


def _is_dead(run: Run) -> bool:
    """Whether the process that opened `run` was on this machine and is gone."""
    host, _, process = run.data.tags.get(_PROCESS_TAG, "").partition("/")
    if host != socket.gethostname() or not process:
        return False
    pid, _, started = process.partition("/")
    try:
        return f"{psutil.Process(int(pid)).create_time():.0f}" != started
    except psutil.NoSuchProcess:
        return True


def close_dead_runs(experiment_id: str) -> None:
    """Mark as FAILED the runs of this machine that still say RUNNING although their process was killed."""
    client = MlflowClient()
    for run in client.search_runs([experiment_id], filter_string="attributes.status = 'RUNNING'"):
        if _is_dead(run):
            client.set_terminated(run.info.run_id, "FAILED")


def fail_open_runs() -> None:
    """Close the active runs of this process as FAILED, innermost first (an interrupt reaches no Kedro hook)."""
    while mlflow.active_run():
        mlflow.end_run("FAILED")
