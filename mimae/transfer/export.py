"""The pretrained encoder, out of a run."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mimae.checkpoints import checkpoint
from mimae.config.load import load_recipe
from mimae.model.encoder import Encoder


def load_encoder(path: str | Path, average: bool = False) -> Encoder:
    """The encoder of a run directory (its newest whole checkpoint) or of one checkpoint directory, in eval mode.

    `average`: the moving average of the weights instead of the weights. The state_dict of what is returned loads into
    the timm ViT of the same size. Raises CheckpointError where there is none, ConfigError for a damaged config.yaml.
    """
    run, found = checkpoint.locate(Path(path))
    averages = _encoder_part(found.tensors("ema")) if average else {}
    if average and not averages:
        raise checkpoint.CheckpointError(f"{found.path} has no moving average: the run's ema.decay was null")
    recipe = load_recipe(run / "config.yaml").recipe
    # Its weights go anywhere; the backend that trained them may be another machine's.
    settings = recipe.model.model_copy(update={"attention": "auto"})
    encoder = Encoder(settings, recipe.data.size_hw, recipe.data.mean, recipe.data.std)
    encoder.load_state_dict(_encoder_part(found.tensors("model")) | averages)
    return encoder.eval()


def _encoder_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("encoder."): value for name, value in tensors.items() if name.startswith("encoder.")}
