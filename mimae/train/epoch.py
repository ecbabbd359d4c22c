"""The sums of an epoch, which go through its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimae.telemetry.clock import Pace, Phases
from mimae.telemetry.records import PHASES

_SECONDS = ("seconds", *(f"seconds_{phase}" for phase in PHASES))


class Sums(NamedTuple):
    """Sums of an epoch, as a checkpoint keeps them."""

    steps: int
    images: int
    seconds: dict[str, float]
    waited: float
    losses: dict[str, float]


def read_sums(state: Any) -> Sums:
    """Return the sums that a checkpoint keeps. Raises ValueError for anything else."""
    try:
        return Sums(
            int(state["steps"]),
            int(state["images"]),
            {key: float(state["seconds"][key]) for key in _SECONDS},
            float(state["waited"]),
            {key: math.nan if value is None else float(value) for key, value in state["losses"].items()},
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"the sums of its epoch are broken ({type(error).__name__}: {error})") from error


class EpochSums:
    """Losses on the device, images and seconds of the epoch that is under way.

    Checkpoints keep them, so that the epoch's line is of the whole epoch however often the run was interrupted. Seconds
    in which steps were taken that no checkpoint kept are lost with them.
    """

    def __init__(self, phases: Phases, views: int) -> None:
        """Seconds count from now on; `views`: how often a step sees each image."""
        self._pace, self._views = Pace(phases, views), views
        self.clear()

    def clear(self) -> None:
        """Begin a new epoch."""
        self._losses: dict[str, Tensor] = {}
        self._steps = self._images = self._uncounted = 0
        self._seconds = dict.fromkeys(_SECONDS, 0.0)
        self._waited = 0.0

    def add(self, losses: Mapping[str, Tensor], images: int) -> None:
        """Add a step. Reads nothing from the device."""
        self._steps += 1
        self._images += images
        self._uncounted += images
        for key, value in losses.items():
            self._losses[key] = self._losses[key] + value if key in self._losses else value

    def record(self) -> dict[str, Any]:
        """Return images, seconds, rates, and the means of the losses. Waits for the device."""
        self._read_pace()
        seconds = max(self._seconds["seconds"], 1e-9)
        return {
            "images": self._images,
            "images_per_s": self._images / seconds,
            "views_per_s": self._images * self._views / seconds,
            "data_wait": min(self._waited / seconds, 1.0),
            **self._seconds,
            **{key: value.item() / self._steps for key, value in self._losses.items()},
        }

    def state(self) -> dict[str, Any]:
        """Return the sums as JSON has them. Waits for the device."""
        self._read_pace()
        sums = {key: value.item() for key, value in self._losses.items()}
        return {
            "steps": self._steps,
            "images": self._images,
            "seconds": self._seconds,
            "waited": self._waited,
            # JSON has no word for what is not finite; the mean of it is null in the records anyway.
            "losses": {key: value if math.isfinite(value) else None for key, value in sums.items()},
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from what `state` returned. Raises ValueError for anything else."""
        self._steps, self._images, self._seconds, self._waited, losses = read_sums(state)
        self._losses = {key: torch.tensor(value, device=device) for key, value in losses.items()}

    def _read_pace(self) -> None:
        """Add the seconds since the last reading."""
        part = self._pace.epoch(self._uncounted)
        self._uncounted = 0
        for key in _SECONDS:
            self._seconds[key] += part[key]
        self._waited += part["data_wait"] * part["seconds"]
