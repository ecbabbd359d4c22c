"""The sums of an epoch (losses, images, seconds), which checkpoints keep."""

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
    """The sums of an epoch as a checkpoint keeps them; times are in seconds."""

    steps: int
    images: int
    seconds: dict[str, float]
    waited: float
    losses: dict[str, float]


def read_sums(state: Any) -> Sums:
    """Return the sums that a checkpoint keeps. Raises ValueError if they are malformed."""
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
    """The sums of the current epoch: losses on the device, images and seconds.

    Checkpoints keep them, so that the epoch's record covers the whole epoch even if the run was interrupted. Steps that
    no checkpoint kept are lost, and so are their seconds.
    """

    def __init__(self, phases: Phases, views: int) -> None:
        """Start to count seconds. `views` is the number of times that a step sees each image."""
        self._pace, self._views = Pace(phases, views), views
        self.clear()

    def clear(self) -> None:
        """Begin a new epoch: set all sums to zero."""
        self._losses: dict[str, Tensor] = {}
        self._steps = self._images = self._uncounted = 0
        self._seconds = dict.fromkeys(_SECONDS, 0.0)
        self._waited = 0.0

    def add(self, losses: Mapping[str, Tensor], images: int) -> None:
        """Add a step, without reading from the device."""
        self._steps += 1
        self._images += images
        self._uncounted += images
        for key, value in losses.items():
            self._losses[key] = self._losses[key] + value if key in self._losses else value

    def record(self) -> dict[str, Any]:
        """Return images, seconds, rates and the means of the losses. The call waits for the device."""
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
        """Return the sums as JSON values. The call waits for the device."""
        self._read_pace()
        sums = {key: value.item() for key, value in self._losses.items()}
        return {
            "steps": self._steps,
            "images": self._images,
            "seconds": self._seconds,
            "waited": self._waited,
            # JSON cannot represent numbers that are not finite; their mean is null in the records anyway.
            "losses": {key: value if math.isfinite(value) else None for key, value in sums.items()},
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue from the sums that `state` returned. Raises ValueError if they are malformed."""
        self._steps, self._images, self._seconds, self._waited, losses = read_sums(state)
        self._losses = {key: torch.tensor(value, device=device) for key, value in losses.items()}

    def _read_pace(self) -> None:
        """Add the seconds since the last reading."""
        part = self._pace.epoch(self._uncounted)
        self._uncounted = 0
        for key in _SECONDS:
            self._seconds[key] += part[key]
        self._waited += part["data_wait"] * part["seconds"]
