"""Kedro's project settings: environments, resolvers of ``conf/`` and the hooks."""

import os
from pathlib import Path

from kedro.utils import find_kedro_project
from omegaconf.resolvers import oc

from hypersd_pipeline.config_loader import ProjectConfigLoader
from hypersd_pipeline.hooks import ChecksHook, ClusterHook, DvcHook, LockHook, LogHook, OrderHook, ResultsHook, TrackingHook


def project_root() -> Path:
    """The folder that owns ``mlflow.db``: DVC's main workspace if DVC runs us in a temporary one, else the Kedro project."""
    return Path(os.environ.get("DVC_ROOT") or find_kedro_project(Path.cwd()) or Path(__file__).parents[2])


def mlflow_uri() -> str:
    """``MLFLOW_TRACKING_URI``, or one sqlite file for the project."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{project_root() / 'mlflow.db'}"


def mlflow_artifacts() -> str | None:
    """Where artifacts go: ``MLFLOW_ARTIFACT_LOCATION``, beside a local sqlite file, or the server's own choice (None)."""
    uri = mlflow_uri()
    beside = str(Path(uri.removeprefix("sqlite:///")).absolute().with_name("mlartifacts")) if uri.startswith("sqlite:///") else None
    return os.environ.get("MLFLOW_ARTIFACT_LOCATION") or beside


# The last registered hook is called first: checks come before a job is submitted, and before anything is recorded.
HOOKS = (ResultsHook(), DvcHook(), TrackingHook(), LockHook(), LogHook(), OrderHook(), ClusterHook(), ChecksHook())
# TrackingHook takes the place of kedro-mlflow's hook.
DISABLE_HOOKS_FOR_PLUGINS = ("kedro-mlflow", "kedro_mlflow", "kedro-telemetry")

# Environments that extend others, sections that are like others, and a data folder per environment.
CONFIG_LOADER_CLASS = ProjectConfigLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    "config_patterns": {"mlflow": ["mlflow*", "mlflow*/**", "**/mlflow*"], "cluster": ["cluster*"], "airflow": ["airflow*"]},
    # An environment overrides single values, not whole top-level keys.
    "merge_strategy": {"parameters": "soft", "airflow": "soft"},
    "custom_resolvers": {"oc.env": oc.env, "mlflow_uri": mlflow_uri, "mlflow_artifacts": mlflow_artifacts},
}
