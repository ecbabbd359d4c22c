"""The encoder of a run, with the settings by which its images are cut."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from mimae.checkpoints import checkpoint
from mimae.config.kept import load_run
from mimae.data.settings import DataSettings
from mimae.errors import CheckpointError
from mimae.model.encoder import Encoder
from mimae.outside.text import printable


class Loaded(NamedTuple):
    """An encoder in eval mode, and the settings by which its images were cut."""

    encoder: Encoder
    data: DataSettings


def load_encoder(path: str | Path, average: bool = False) -> Encoder:
    """Return the encoder of a run (its newest whole checkpoint) or of one checkpoint directory, in eval mode.

    `average`: the moving average of the weights instead of the weights. The state_dict of the encoder loads into the
    timm ViT of the same size. Raises CheckpointError where there is none, ConfigError for a damaged config.yaml.
    """
    return load(path, average).encoder


def load(path: str | Path, average: bool = False) -> Loaded:
    """Return what `load_encoder` does, with its data settings."""
    path = Path(path)
    recipe = load_run(checkpoint.run_of(path))
    if average and recipe.ema.decay is None:
        raise CheckpointError(f"{path} has no moving average: the run's ema.decay was null")
    # Its weights go anywhere; the backend that trained them may be another machine's.
    settings = recipe.model.model_copy(update={"attention": "auto"})
    encoder = Encoder(settings, recipe.data.size_hw, recipe.data.mean, recipe.data.std)

    def fill(found: checkpoint.Checkpoint) -> None:
        averages = _encoder_part(found.tensors("ema")) if average else {}
        if average and not averages:
            raise CheckpointError(f"{found.path} has no moving average")
        try:
            encoder.load_state_dict(_encoder_part(found.tensors("model")) | averages)
        except RuntimeError as error:  # other names or shapes
            said = printable(" ".join(str(error).split()))[:300]
            raise CheckpointError(f"{found.path} does not hold the encoder of config.yaml: {said}") from error

    checkpoint.use_at(path, fill)
    return Loaded(encoder.eval(), recipe.data)


def _encoder_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
