"""MLflow tracker. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME name server and experiment (default: RUN/mlflow)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from mimae.outside.files import Folder
from mimae.telemetry.trackers import kept_id

_STRANGE = re.compile(r"[^\w.\- ]")
"""Characters that MLflow refuses in the name of a metric; it would refuse all metrics of the call."""

_AT_ONCE, _LETTERS = 1000, 200
"""Largest number of metrics that MLflow takes in a call, and of letters of a name that are sent; it takes 250."""


def _name(key: str) -> str:
    """Return the name of a column for MLflow; names of classes may have any characters."""
    return _STRANGE.sub("_", key)[:_LETTERS]


class MLflow:
    """A run in an experiment, which is `mimae` by default."""

    name = "mlflow"

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._client: Any = None
        self._id = ""

    def rewind(self, step: int) -> None:
        server = os.environ.get("MLFLOW_TRACKING_URI")
        if server is None:
            # Newer versions need this variable before they use files.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            server = self._folder.folder(self.name).absolute().as_uri()
        self._client = MlflowClient(server)
        self._id = kept_id(self._folder, self.name, self._make)
        self._client.update_run(self._id, status="RUNNING")

    def _make(self) -> str:
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mimae")
        found = self._client.get_experiment_by_name(wanted)
        experiment = self._client.create_experiment(wanted) if found is None else found.experiment_id
        made = self._client.create_run(experiment, run_name=self._folder.path.absolute().name)
        return str(made.info.run_id)

    def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        now = int(1000 * time.time())
        found = [
            Metric(f"{group}/{_name(key)}", float(value), now, step)
            for key, value in values.items()
            if key != "step" and value is not None
        ]
        for first in range(0, len(found), _AT_ONCE):
            self._client.log_batch(self._id, metrics=found[first : first + _AT_ONCE], synchronous=True)

    def image(self, path: str, png: bytes, step: int) -> None:
        folder = path.rpartition("/")[0]
        local = self._folder.path / path  # The records have written the file.
        self._client.log_artifact(self._id, str(local), folder or None)

    def text(self, name: str, text: str, step: int) -> None:
        self._client.log_text(self._id, text, name)

    def close(self) -> None:
        self._client.set_terminated(self._id)
