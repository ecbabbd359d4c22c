"""MLflow tracker. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME name server and experiment (default: RUN/mlflow)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from mimae.outside.files import Folder
from mimae.outside.text import printable
from mimae.telemetry.trackers import kept_id

_STRANGE = re.compile(r"[^\w.\- ]")
"""Characters that MLflow refuses in the name of a metric; it would refuse all metrics of the call."""

_AT_ONCE, _LETTERS = 1000, 200
"""Largest number of metrics that MLflow takes in a call, and of letters of a name that are sent; it takes 250."""


def _names(group: str, keys: Iterable[str]) -> dict[str, str]:
    """Return distinct names for MLflow by column; names of classes may have any characters."""
    found: dict[str, str] = {}
    for place, key in enumerate(keys):
        name = f"{group}/{_STRANGE.sub('_', key)[:_LETTERS]}"
        found[f"{name}_{place}" if name in found else name] = key
    return {key: name for name, key in found.items()}


class MLflow:
    """A run in an experiment, which is `mimae` by default."""

    name = "mlflow"

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._client: Any = None
        self._id = ""

    def rewind(self, step: int) -> None:
        home, server = None, os.environ.get("MLFLOW_TRACKING_URI")
        if server is None:
            # Newer versions need this variable before they use files.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            home = self._folder.entrust(self.name).resolve()
            server = home.as_uri()
        self._client = MlflowClient(server)
        self._id = kept_id(self._folder, self.name, self._make)
        self._client.update_run(self._id, status="RUNNING")
        if home is not None:
            self._check(home)

    def _check(self, home: Path) -> None:
        """Raise OSError if the run's files in `home` name another place for its pictures and texts.

        They do so in a run directory from another place or machine: mlflow writes absolute paths.
        """
        place = urlsplit(self._client.get_run(self._id).info.artifact_uri)
        if place.scheme not in ("", "file") or not Path(os.path.realpath(unquote(place.path))).is_relative_to(home):
            raise OSError(f"its files in {home} name {printable(place.geturl())} as the place of pictures and texts")

    def _make(self) -> str:
        wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mimae")
        found = self._client.get_experiment_by_name(wanted)
        experiment = self._client.create_experiment(wanted) if found is None else found.experiment_id
        made = self._client.create_run(experiment, run_name=self._folder.path.absolute().name)
        return str(made.info.run_id)

    def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        now = int(1000 * time.time())
        names = _names(group, values)
        found = [
            Metric(names[key], float(value), now, step)
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
