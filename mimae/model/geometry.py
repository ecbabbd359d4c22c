"""The grid of patches of an image, and the number of patches that each view shows and predicts. It needs no torch.

Letters in shapes: N views, L patches, K visible, M targets, P patch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mimae.data.settings import DataSettings
from mimae.model.settings import DecoderSettings, MaskingSettings, ModelSettings


class Grid(NamedTuple):
    """The patches of an image, numbered row by row."""

    rows: int
    columns: int
    patch_size: int
    """P, the side of a patch in pixels."""

    @classmethod
    def of(cls, size_hw: Sequence[int], patch_size: int) -> Grid:
        """Return the grid of an image of (height, width) pixels. Pixels at the end that fill no patch are left out."""
        height, width = size_hw
        return cls(height // patch_size, width // patch_size, patch_size)

    @property
    def patches(self) -> int:
        """L, the number of patches of an image."""
        return self.rows * self.columns

    @property
    def values(self) -> int:
        """3P^2, the number of values of a patch."""
        return 3 * self.patch_size**2

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.rows * self.patch_size, self.columns * self.patch_size


class Geometry(NamedTuple):
    """The sizes of a training image: its grid of patches, and its views."""

    grid: Grid
    views: int
    """N, the number of views of an image."""
    visible: int
    """K, the number of patches that a view shows."""
    targets: int
    """M, the number of patches that the decoder predicts from a view."""

    @property
    def hidden(self) -> int:
        """L - K, the number of patches that a view hides."""
        return self.grid.patches - self.visible


class Sections(Protocol):
    """The sections of a recipe that determine its geometry."""

    @property
    def data(self) -> DataSettings: ...
    @property
    def masking(self) -> MaskingSettings: ...
    @property
    def model(self) -> ModelSettings: ...
    @property
    def decoder(self) -> DecoderSettings: ...


def geometry(recipe: Sections, size_hw: Sequence[int] | None = None) -> Geometry:
    """Return the geometry of a recipe's images, of (height, width) pixels; None: of the size of data.image_size."""
    grid = Grid.of(size_hw or recipe.data.size_hw, recipe.model.patch_size)
    visible = recipe.masking.num_visible(grid.patches)
    targets = visible if recipe.decoder.predict == "next_view" else grid.patches - visible
    return Geometry(grid, recipe.masking.num_masks, visible, targets)
