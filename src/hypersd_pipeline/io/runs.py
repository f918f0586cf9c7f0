"""Finished runs, found by name in MLflow or as a data folder."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset

from hypersd_pipeline.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from PIL.Image import Image

    from hypersd_pipeline.comparison.runs import ComparedRun, Model, Runs

_CODE = ("git_commit", "git_dirty", "torch", "python", "device")
_DATA = "data_hash"
_LISTED = 5


class RunsDataset(AbstractDataset[None, "Runs"]):
    """Loads as a function from what a user calls a run to a `ComparedRun`: a data folder, or an id or a name in MLflow.

    Args:
        uri: MLflow's store.
    """

    def __init__(self, *, uri: str, metadata: dict[str, Any] | None = None) -> None:
        self._uri, self.metadata = uri, metadata

    def load(self) -> Runs:
        from hypersd_pipeline.comparison.runs import read_run

        def find(name: str) -> ComparedRun:
            return read_run(Path(name)) if Path(name).is_dir() else RunReader(self._uri).read(name)

        return find

    def save(self, data: None) -> None:
        raise UserError("Runs are an input of a node and never its output: correct the wiring in pipeline.py.")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {}  # the address may carry a password


class RunReader:
    """Reads runs from a store of MLflow.

    Raises:
        UserError: it cannot be reached.
    """

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self._client: MlflowClient = MlflowClient(uri)

    def read(self, name: str) -> ComparedRun:
        """The run of this id, or the newest of this name.

        Raises:
            UserError: there is none, or its models have no scores.
        """
        from hypersd_pipeline.comparison.runs import ComparedRun, total

        run = self._find(name)
        parts = [run, *self._children(run)]
        models = {found: model for part in parts for found, model in self._models(part)}
        if not models:
            raise UserError(
                f"compare.runs: the run {run.info.run_name} ({run.info.run_id}) has no scores of its models; give one that evaluated "
                "models since version 0.2."
            )
        stages = [part for part in parts if "train_seconds" in part.data.metrics or "mean_step_seconds" in part.data.metrics]
        memory = [part.data.metrics["peak_memory_mb"] for part in stages if "peak_memory_mb" in part.data.metrics]
        ended = run.info.end_time
        return ComparedRun(
            name=run.info.run_name,
            place=run.info.run_id,
            models=models,
            train_seconds=total([part.data.metrics.get("train_seconds") for part in stages]),
            peak_memory_mb=max(memory, default=None),
            wall_seconds=(ended - run.info.start_time) / 1000 if ended else None,
            parameters=dict(run.data.params),
            data={_DATA: run.data.tags[_DATA]} if _DATA in run.data.tags else {},
            code={tag: run.data.tags[tag] for tag in _CODE if tag in run.data.tags},
        )

    def _find(self, name: str) -> Run:
        from mlflow.exceptions import MlflowException

        if re.fullmatch("[0-9a-f]{32}", name):
            try:
                return self._client.get_run(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiments = [experiment.experiment_id for experiment in self._client.search_experiments()]
        newest = ["attributes.start_time DESC"]
        escaped = name.replace("'", "")
        found = self._client.search_runs(experiments, f"attributes.run_name = '{escaped}'", order_by=newest, max_results=1)
        if found and found[0].info.run_name == name:
            return found[0]
        runs = self._client.search_runs(experiments, order_by=newest, max_results=100)
        known = [f"{run.info.run_id} ({run.info.run_name})" for run in runs if "mlflow.parentRunId" not in run.data.tags]
        told = f"choose one of {', '.join(known[:_LISTED])}" if known else "MLflow has no runs yet"
        raise UserError(f"compare.runs: '{name}' is no data folder, and no id or name of a run in MLflow; {told}.")

    def _children(self, run: Run) -> list[Run]:
        found = self._client.search_runs([run.info.experiment_id], f"tags.\"mlflow.parentRunId\" = '{run.info.run_id}'")
        return sorted(found, key=lambda child: child.info.start_time)

    def _models(self, run: Run) -> Iterator[tuple[str, Model]]:
        """The models whose samples a run keeps."""
        from hypersd_pipeline.comparison.runs import Model, model_name
        from hypersd_pipeline.evaluation.scores import FILE, read_scores

        for item in self._client.list_artifacts(run.info.run_id):
            name = model_name(item.path) if item.is_dir else None
            if name and any(file.path == f"{item.path}/{FILE}" for file in self._client.list_artifacts(run.info.run_id, item.path)):
                with tempfile.TemporaryDirectory() as folder:
                    found = self._client.download_artifacts(run.info.run_id, f"{item.path}/{FILE}", folder)
                    scores = read_scores(Path(found).parent)
                yield name, Model(scores, self._images(run.info.run_id, item.path))

    def _images(self, run_id: str, path: str) -> Callable[[int], list[Image]]:
        def images(steps: int) -> list[Image]:
            from hypersd_pipeline.evaluation.samples import read_samples

            with tempfile.TemporaryDirectory() as folder:
                found = self._client.download_artifacts(run_id, f"{path}/{steps}_steps", folder)
                return read_samples(Path(found).parent, steps)

        return images
