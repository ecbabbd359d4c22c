"""MI-MAE: encoder, decoder and objective in one forward, uint8 pixels in and losses out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mimae.data.settings import DataSettings
from mimae.model import attention
from mimae.model.decoder import Decoder
from mimae.model.encoder import Encoder
from mimae.model.recomputation import BUDGET
from mimae.model.settings import DecoderSettings, MaskingSettings, ModelSettings
from mimae.model.units import Model
from mimae.objective.objective import Losses, Objective
from mimae.objective.settings import ObjectiveSettings
from mimae.randomness import initialise, materialise

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe


class MIMAE(Model):
    """The model that is pretrained. With N=1 and no MI terms its loss and gradients are MAE's, exactly."""

    evaluations = ("predict", "features")

    def __init__(
        self,
        data: DataSettings,
        masking: MaskingSettings,
        model: ModelSettings,
        decoder: DecoderSettings,
        objective: ObjectiveSettings,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(model, data.size_hw, data.mean, data.std)
        self.decoder = Decoder(decoder, model, self.encoder.grid)
        self.compiled_budget = BUDGET if model.checkpointing == "selective" else 1.0
        self.objective = Objective(objective, masking.num_masks, model.width, self.encoder.grid)

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks of the encoder, then those of the decoder."""
        return (*self.encoder.blocks, *self.decoder.blocks)

    def forward(self, images: Tensor, visible: Tensor, targets: Tensor) -> Losses:
        """images (B, H, W, 3) uint8, visible (B, N, K), targets (B, N, M) -> losses; `loss` carries the graph."""
        tokens = self.encoder(images, visible)
        # Latents and losses are fp32 (or float64) whatever the precision of the networks.
        exact = torch.autocast(images.device.type, enabled=False)
        with exact:
            started = self.objective.start(tokens)
        predictions = self.decoder(tokens, visible, targets)
        with exact:
            return self.objective(predictions, started, images, targets, self.encoder.mean, self.encoder.std)

    def predict(self, images: Tensor, visible: Tensor, targets: Tensor) -> Tensor:
        """-> predictions (B, N, M, 3P^2), in the space of the reconstruction target."""
        return self.decoder(self.encoder(images, visible), visible, targets)

    def features(self, images: Tensor) -> Tensor:
        """See `Encoder.features`."""
        return self.encoder.features(images)


def outline(recipe: Recipe) -> MIMAE:
    """The model of a recipe on the meta device: shapes and constants, no weights."""
    with torch.device("meta"):
        return MIMAE(recipe.data, recipe.masking, recipe.model, recipe.decoder, recipe.objective)


def build(recipe: Recipe, device: torch.device | str = "cpu") -> MIMAE:
    """The model of a recipe with the initial weights of its seed, on `device`."""
    model = outline(recipe)
    materialise(model, device)
    initialise(model, recipe.seed)
    return model


def obstacles(recipe: Recipe, device: torch.device) -> dict[str, str | None]:
    """Return, by `key=value`, why the model of a recipe cannot run on a device; None where it can."""
    model, decoder = recipe.model, recipe.decoder
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    heads = {model.width // model.heads, decoder.width // decoder.heads}
    return {
        f"model.attention={model.attention}": attention.obstacle(model.attention, device, dtype, heads),
        f"model.checkpointing={model.checkpointing}": _checkpointing_obstacle(recipe),
    }


def _checkpointing_obstacle(recipe: Recipe) -> str | None:
    """Return why blocks cannot be recomputed."""
    if recipe.model.checkpointing == "selective" and recipe.engine.kind == "zero3":
        return (
            "with engine.kind=zero3, which gathers weights inside blocks, its losses differed from those without by "
            "more than rounding; model.checkpointing=full works, and so does engine.kind=fsdp"
        )
    if recipe.model.checkpointing == "full" and recipe.compile == "graphs":
        return "CUDA graphs replay a forward into memory that its recomputation would overwrite; compile=on does not"
    return None
