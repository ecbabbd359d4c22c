"""Weights & Biases tracker. Server, project and mode come from its variables: WANDB_PROJECT, WANDB_MODE=offline, ..."""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
import yaml
from PIL import Image

from mimae.outside.files import Folder
from mimae.telemetry.trackers import kept_id


class WandB:
    """A run in the project WANDB_PROJECT, by default `mimae`. Its files are in the run's wandb/."""

    name = "wandb"

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._run: Any = None

    def rewind(self, step: int) -> None:
        self._folder.folder(self.name)  # Raises if it is a link. Inside it wandb makes its own links, and new names.
        home = self._folder.path.absolute()
        self._run = wandb.init(
            id=kept_id(self._folder, self.name, lambda: secrets.token_hex(4)),
            resume="allow",
            dir=str(home),
            project=os.environ.get("WANDB_PROJECT", "mimae"),
            name=home.name,
            settings=wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True),
        )
        # Steps after a checkpoint are repeated, but the library's own step count can only grow.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, group: str, values: Mapping[str, Any], step: int) -> None:
        found = {f"{group}/{key}": value for key, value in values.items() if key != "step" and value is not None}
        self._run.log({"step": step, **found})

    def image(self, path: str, png: bytes, step: int) -> None:
        picture = wandb.Image(Image.open(io.BytesIO(png)).convert("RGB"))
        self._run.log({"step": step, Path(path).parent.name or "image": picture})

    def text(self, name: str, text: str, step: int) -> None:
        stem, kind = Path(name).stem, Path(name).suffix
        found = json.loads(text) if kind == ".json" else yaml.safe_load(text)
        self._run.config.update(found if stem == "config" else {stem: found}, allow_val_change=True)

    def close(self) -> None:
        self._run.finish()
