"""MLflow's registry of models: versions of one model, with the aliases ``champion`` and ``challenger``."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset

from hypersd_pipeline.errors import UserError
from hypersd_pipeline.io.lora import WEIGHTS, LoRADataset, read_lora
from hypersd_pipeline.masking import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from hypersd_pipeline.models.lora import LoRA
    from hypersd_pipeline.retraining.run import Version

log = logging.getLogger(__name__)

CHAMPION = "champion"
_BEFORE = "champion_before"
"""The tag of a version that says which one it took the place of: what a rollback goes back to."""
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the store in a database calls a missing alias invalid


class ModelRegistry:
    """The versions of one model. Each has a run of its own, which keeps its files, in an experiment of the model's name.

    Args:
        name: of the model. path: a folder of this machine. uri: MLflow's store. artifacts: where a new experiment keeps its files.

    Raises:
        UserError: MLflow cannot be used.
    """

    def __init__(self, name: str, path: Path, uri: str, artifacts: str | None = None) -> None:
        from mlflow import MlflowClient

        from hypersd_pipeline.io.mlflow_store import make_database

        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # MLflow's own patience is minutes a request
        make_database(uri)
        self.name, self.path, self._uri, self._artifacts = name, path, uri, artifacts
        self._client: MlflowClient = MlflowClient(uri, registry_uri=uri)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Raises UserError for what MLflow refuses, without secrets."""
        from mlflow.exceptions import MlflowException

        from hypersd_pipeline.io.mlflow_store import reason

        try:
            yield
        except MlflowException as error:
            raise UserError(
                f"MLflow's model registry at {masked(self._uri)} cannot be used ({reason(error)}); "
                "start or correct it, and give the command again."
            ) from error

    def version(self, alias: str) -> Version | None:
        """See `retraining.run.Models.version`."""
        from mlflow.exceptions import MlflowException

        with self._asking():
            try:
                found = self._client.get_model_version_by_alias(self.name, alias)
            except MlflowException as error:
                if error.error_code in _MISSING:
                    return None
                raise
        return self._version(found.version, found.run_id)

    def _version(self, number: str, run_id: str | None) -> Version:
        from hypersd_pipeline.retraining.run import Version

        return Version(str(number), self._fetching(str(number), run_id))

    def _fetching(self, number: str, run_id: str | None) -> Callable[[str, Path], Path]:
        def fetch(part: str, folder: Path) -> Path:
            if not run_id:
                raise UserError(f"{self.name} version {number} belongs to no run, so its files are not known; register it by a retraining.")
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with self._asking():
                    return Path(self._client.download_artifacts(run_id, part, str(folder)))
            except OSError as error:
                raise UserError(f"{self.name} version {number}: its files are gone ({error}); put them back, or roll back.") from error

        return fetch

    def write_lora(self, folder: Path, lora: LoRA) -> None:
        """See `retraining.run.Models.write_lora`."""
        LoRADataset(filepath=str(folder)).save(lora)

    def read_lora(self, folder: Path) -> LoRA:
        """See `retraining.run.Models.read_lora`."""
        return read_lora(folder / WEIGHTS)

    def register(self, folder: Path, tags: Mapping[str, str], description: str) -> Version:
        """See `retraining.run.Models.register`."""
        with self._asking():
            self._make()
            run = self._client.create_run(self._experiment(), run_name=f"{self.name} {time.strftime('%Y-%m-%d %H:%M')}", tags=dict(tags))
            run_id = run.info.run_id
            try:
                self._client.log_artifacts(run_id, str(folder))
                source = f"runs:/{run_id}/lora"
                made = self._client.create_model_version(self.name, source, run_id, tags=dict(tags), description=description[:5000])
            except BaseException:
                self._client.set_terminated(run_id, "FAILED")
                raise
            self._client.set_terminated(run_id, "FINISHED")
        return self._version(made.version, run_id)

    def _make(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _experiment(self) -> str:
        name = f"{self.name} versions"
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else str(self._client.create_experiment(name, self._artifacts))

    def promote(self, version: Version, instead_of: str | None) -> None:
        """See `retraining.run.Models.promote`."""
        now = self.version(CHAMPION)
        if (now.number if now else None) != instead_of:
            raise UserError(
                f"{self.name}: another process made version {now.number if now else 'none'} the champion meanwhile; run retrain again."
            )
        with self._asking():
            if instead_of is not None:
                self._client.set_model_version_tag(self.name, version.number, _BEFORE, instead_of)
            self._client.set_registered_model_alias(self.name, CHAMPION, version.number)

    def set_alias(self, alias: str, version: Version) -> None:
        """See `retraining.run.Models.set_alias`."""
        with self._asking():
            self._client.set_registered_model_alias(self.name, alias, version.number)

    def rollback(self) -> tuple[str, str]:
        """Make the version the champion whose place the champion took. Again: the one before that.

        Returns:
            The version that was the champion, and the one that is now.

        Raises:
            UserError: there is no champion, or none before it.
        """
        now = self.version(CHAMPION)
        if now is None:
            raise UserError(f"{self.name} has no champion in MLflow at {masked(self._uri)}; run `kedro run --pipelines retrain` first.")
        with self._asking():
            before = self._client.get_model_version(self.name, now.number).tags.get(_BEFORE)
            if before is None:
                raise UserError(f"{self.name}: version {now.number} is the first champion, so there is none to go back to.")
            self._client.get_model_version(self.name, before)  # it may have been deleted since
            self._client.set_model_version_tag(self.name, now.number, "rolled_back", time.strftime("%Y-%m-%dT%H:%M:%S%z"))
            self._client.set_registered_model_alias(self.name, CHAMPION, before)
        return now.number, before


class RegistryDataset(AbstractDataset[None, ModelRegistry]):
    """Loads as a `ModelRegistry`.

    Args:
        filepath: a folder of this machine. uri, artifacts: see `ModelRegistry`.
        model: the name of the model. The runs of an environment have a model of their own, with its name behind.
        data: the data folder, whose name is that of the environment.
    """

    def __init__(
        self, *, filepath: str, uri: str, model: str, data: str, artifacts: str | None = None, metadata: dict[str, Any] | None = None
    ) -> None:
        self._filepath, self._uri, self._artifacts, self.metadata = Path(filepath), uri, artifacts, metadata
        environment = Path(data).name
        self._model = model if environment == "data" else f"{model}-{environment}"

    def load(self) -> ModelRegistry:
        return ModelRegistry(self._model, self._filepath, self._uri, self._artifacts)

    def save(self, data: None) -> None:
        raise UserError("The model registry is an input of a node and never its output: correct the wiring in pipeline.py.")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"model": self._model}  # the address may carry a password
