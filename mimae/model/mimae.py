"""MI-MAE: encoder, decoder and objective in one forward, from uint8 pixels to losses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mimae.data.settings import DataSettings
from mimae.model import attention
from mimae.model.decoder import Decoder
from mimae.model.encoder import Encoder
from mimae.model.geometry import Grid
from mimae.model.portable import Form, Graph, encoder_graph
from mimae.model.positions import GridPositions
from mimae.model.settings import DecoderSettings, MaskingSettings, ModelSettings
from mimae.model.units import Model
from mimae.objective.objective import Losses, Objective
from mimae.objective.settings import ObjectiveSettings
from mimae.optim import resolution
from mimae.optim.resolution import Size
from mimae.randomness import initialise, materialise

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe


class MIMAE(Model):
    """The model of pretraining. With N=1 and without MI terms its loss and gradients are exactly MAE's."""

    evaluations = ("predict", "features")

    def __init__(
        self,
        data: DataSettings,
        masking: MaskingSettings,
        model: ModelSettings,
        decoder: DecoderSettings,
        objective: ObjectiveSettings,
        sizes: Iterable[Size] = (),
    ) -> None:
        """`sizes`: further sizes of images that the model is trained on; each grid has sines and cosines of its own."""
        super().__init__()
        self.encoder = Encoder(model, data.size_hw, data.mean, data.std)
        self.decoder = Decoder(decoder, model, self.encoder.grid)
        self.objective = Objective(objective, masking.num_masks, model.width, self.encoder.grid)
        grids = {Grid.of(size, model.patch_size) for size in sizes} - {self.encoder.grid}
        self.num_sizes = 1 + len(grids)
        self.encoder_positions = GridPositions(model.width, sorted(grids))
        self.decoder_positions = GridPositions(decoder.width, sorted(grids))

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks of the encoder, then those of the decoder."""
        return (*self.encoder.blocks, *self.decoder.blocks)

    def forward(self, images: Tensor, visible: Tensor, targets: Tensor) -> Losses:
        """Return the losses for images (B, H, W, 3) uint8, visible (B, N, K) and targets (B, N, M).

        Only the field `loss` has a gradient.
        """
        grid = Grid.of(images.shape[1:3], self.encoder.grid.patch_size)
        tokens = self.encoder(images, visible, positions=self.encoder_positions(grid))
        # Latents and losses are fp32 (or float64) for every precision of the networks.
        exact = torch.autocast(images.device.type, enabled=False)
        with exact:
            started = self.objective.start(tokens)
        predictions = self.decoder(tokens, visible, targets, self.decoder_positions(grid))
        with exact:
            return self.objective(predictions, started, images, targets, self.encoder.mean, self.encoder.std)

    def predict(self, images: Tensor, visible: Tensor, targets: Tensor) -> Tensor:
        """Return predictions (B, N, M, 3P^2) in the space of the reconstruction target; arguments as in `forward`."""
        grid = Grid.of(images.shape[1:3], self.encoder.grid.patch_size)
        tokens = self.encoder(images, visible, positions=self.encoder_positions(grid))
        return self.decoder(tokens, visible, targets, self.decoder_positions(grid))

    def features(self, images: Tensor) -> Tensor:
        """See `Encoder.features`."""
        return self.encoder.features(images)

    def graph(self, form: Form) -> Graph:
        """Return the encoder in plain operators."""
        return encoder_graph(self.encoder, form)


def outline(recipe: Recipe) -> MIMAE:
    """Return the model of a recipe on the meta device: it has shapes and constants, but no weights."""
    with torch.device("meta"):
        sizes = resolution.sizes(recipe.schedule, recipe.data.size_hw)
        return MIMAE(recipe.data, recipe.masking, recipe.model, recipe.decoder, recipe.objective, sizes)


def build(recipe: Recipe, device: torch.device | str = "cpu") -> MIMAE:
    """Return the model of a recipe on `device`, with the initial weights of the recipe's seed."""
    model = outline(recipe)
    materialise(model, device)
    initialise(model, recipe.seed)
    return model


def obstacles(recipe: Recipe, device: torch.device) -> dict[str, str | None]:
    """Return, by `key=value`, the reason why a setting of the model cannot run on a device, or None if it can."""
    model, decoder = recipe.model, recipe.decoder
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    heads = {model.width // model.heads, decoder.width // decoder.heads}
    return {
        f"model.attention={model.attention}": attention.obstacle(model.attention, device, dtype, heads),
        f"compile={recipe.compile} with schedule.resolution": (
            "CUDA graphs were not proven with images of several sizes; legal are compile=on, and schedule.resolution=[]"
            if recipe.schedule.resolution and recipe.compile == "graphs"
            else None
        ),
    }
