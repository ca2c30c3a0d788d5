"""An MLflow server, asked within a bounded time; whatever it does not answer is one error."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qdeploy.errors import InputError, UsageError, foreign_reader

ENVIRONMENT = {  # unless the user has set them
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # 7, which take minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds; 120
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder of runs, which it would rather see in a database
}
READY_SECONDS = 30  # for a new model version
LARGEST_BATCH = 500  # metrics; servers take 1000


@contextmanager
def connected(uri: str) -> Iterator[Server]:
    """The MLflow server at `uri`, while the context is open.

    Raises:
        UsageError: MLflow is not installed, or the address carries a password.
    """
    _refuse_password(uri)
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update({name: ENVIRONMENT[name] for name, old in before.items() if old is None})
    try:
        yield Server(uri, _client(uri))
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)


def _client(uri: str) -> Any:
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise UsageError(
            "runs are logged by MLflow, which is not installed",
            hint="pip install 'qdeploy[mlflow]'",
        ) from error
    with foreign_reader(f"MLflow at {uri}"):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _refuse_password(uri: str) -> None:
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UsageError(f"--tracking-uri {uri}: {error}") from error
    if parts.password is not None or parts.username is not None:
        raise UsageError(
            f"--tracking-uri: {parts.hostname} with a user name in the address, which others see",
            hint="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )


@dataclass(frozen=True, slots=True)
class Server:
    """The few questions that are asked. Every method raises InputError if it fails."""

    uri: str
    client: Any  # MlflowClient

    def experiment(self, name: str) -> str:
        """The id of the experiment called `name`, which is made if it is not there."""
        with self._asking():
            found = self.client.get_experiment_by_name(name)
        if found is None:
            with self._asking():
                return str(self.client.create_experiment(name))
        if found.lifecycle_stage != "active":
            raise InputError(f"MLflow at {self.uri}: experiment {name} is deleted")
        return str(found.experiment_id)

    def find_run(self, experiment: str, key: str, value: str) -> str | None:
        """The id of the newest run whose tag `key` is `value`."""
        with self._asking():
            found = self.client.search_runs(
                [experiment], f"tags.`{key}` = '{value}'", max_results=1
            )
        return str(found[0].info.run_id) if found else None

    def new_run(self, experiment: str, name: str, tags: Mapping[str, str]) -> str:
        with self._asking():
            run = self.client.create_run(experiment, tags=dict(tags), run_name=name)
        return str(run.info.run_id)

    def params(self, run: str) -> dict[str, str]:
        with self._asking():
            return dict(self.client.get_run(run).data.params)

    def log_params(self, run: str, params: Mapping[str, str]) -> None:
        for name, value in params.items():
            with self._asking():
                self.client.log_param(run, name, value)

    def log_metrics(self, run: str, metrics: Mapping[str, float], milliseconds: int) -> None:
        with self._asking():
            from mlflow.entities import Metric

            values = [Metric(name, x, milliseconds, 0) for name, x in metrics.items()]
            for start in range(0, len(values), LARGEST_BATCH):
                self.client.log_batch(run, metrics=values[start : start + LARGEST_BATCH])

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            with self._asking():
                self.client.set_tag(run, name, value)

    def set_status(self, run: str, status: str) -> None:
        """RUNNING, FINISHED or FAILED."""
        with self._asking():
            if status == "RUNNING":
                self.client.update_run(run, status)
            else:
                self.client.set_terminated(run, status)

    def log_file(self, run: str, path: Path, folder: str | None) -> None:
        with self._asking():
            self.client.log_artifact(run, str(path), folder)

    def new_version(self, name: str, run: str, folder: str, tags: Mapping[str, str]) -> str:
        """Register the files that a run has in `folder`."""
        with self._asking():
            if not self.client.search_registered_models(f"name = '{name}'", max_results=1):
                self.client.create_registered_model(name)
            made = self.client.create_model_version(
                name, f"runs:/{run}/{folder}", run, tags=dict(tags),
                await_creation_for=READY_SECONDS,
            )  # fmt: skip
        return str(made.version)

    def find_version(self, name: str, run: str, key: str, value: str) -> str | None:
        """The version of `name` that was made from a run and whose tag `key` is `value`."""
        with self._asking():
            found = self.client.search_model_versions(f"run_id = '{run}'")
        same = (v for v in found if v.name == name and v.tags.get(key) == value)
        return next((str(v.version) for v in same), None)

    def aliased(self, name: str, alias: str) -> str:
        """The number of the version that an alias stands for."""
        with self._asking():
            return str(self.client.get_model_version_by_alias(name, alias).version)

    def newest_versions(self) -> list[tuple[str, str]]:
        """Name and number of the newest version of every registered model."""
        with self._asking():
            names, token = [], None
            while True:
                page = self.client.search_registered_models(page_token=token)
                names += [model.name for model in page]
                token = page.token
                if not token:
                    break
            found = [(n, self.client.search_model_versions(f"name = '{n}'")) for n in names]
        return [(n, str(max(int(v.version) for v in some))) for n, some in found if some]

    def download_version(self, name: str, version: str, folder: Path) -> None:
        """Put the files of a version into `folder`."""
        with self._asking():
            from mlflow.artifacts import download_artifacts

            source = self.client.get_model_version_download_uri(name, version)
            download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=self.uri)

    def version_holds(self, name: str, version: str, sha256: str) -> bool:
        """One of the version's files, which are fetched, has this digest."""
        with tempfile.TemporaryDirectory(prefix="qdeploy-") as folder:
            self.download_version(name, version, Path(folder))
            files = (path for path in Path(folder).rglob("*") if path.is_file())
            return any(_digest(path) == sha256 for path in files)

    def tag_version(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            with self._asking():
                self.client.set_model_version_tag(name, version, key, value)

    def _asking(self) -> AbstractContextManager[None]:
        return foreign_reader(f"MLflow at {self.uri}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
