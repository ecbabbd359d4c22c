"""The encoder: a ViT with timm's names that sees only the visible patches of each view.

Letters in shapes: B images, N views, L patches, K visible, T = 1 + K tokens, D width, P patch size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimae import kernels
from mimae.model.blocks import Block, as_stream, run_blocks
from mimae.model.geometry import Grid
from mimae.model.images import Images, batch_of
from mimae.model.positions import resampled, sincos_positions
from mimae.model.recomputation import call
from mimae.model.settings import ModelSettings, PatchBias
from mimae.randomness import Initial, Uniform


class PatchProjection(nn.Module):
    """The patch projection, under timm's name `patch_embed.proj`; it runs the fused embedding."""

    def __init__(self, width: int, patch: int, bias: PatchBias = "zero") -> None:
        super().__init__()
        # The bound is computed here, because the shape of a sharded weight does not show the number of inputs.
        self.initial: dict[str, Initial] = {"bias": Uniform((3 * patch**2) ** -0.5)} if bias == "uniform" else {}
        self.weight = nn.Parameter(torch.empty(width, 3, patch, patch))
        self.bias = nn.Parameter(torch.empty(width))

    def initial_values(self) -> dict[str, Initial]:
        """Return the initial values that differ from the rules of `randomness.initialise`."""
        return self.initial

    def forward(self, images: Tensor, visible: Tensor, pos: Tensor, cls: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if images.is_floating_point():
            return self._of_whole_images(images, pos, cls)
        return kernels.embed_visible(images, visible, self.weight, self.bias, pos, cls, mean, std)

    def _of_whole_images(self, images: Tensor, pos: Tensor, cls: Tensor) -> Tensor:
        """Return the tokens (B, 1, 1 + L, D) of images (B, H, W, 3) that are already normalised."""
        side = self.weight.shape[-1]
        patches = images.unfold(1, side, side).unfold(2, side, side)  # (B, rows, columns, 3, P, P)
        tokens = F.linear(patches.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias) + pos[1:]
        return torch.cat([(cls + pos[0]).expand(len(images), 1, -1), tokens], 1)[:, None]


class Encoder(nn.Module):
    """A ViT over visible tokens. Its state_dict has the names and shapes of timm's ViT of the same size."""

    mean: Tensor
    std: Tensor
    pos_embed: Tensor

    def __init__(
        self,
        settings: ModelSettings,
        image_size: tuple[int, int],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        *,
        learned_positions: bool = False,
    ) -> None:
        """Build the encoder.

        With `learned_positions` the positions are a parameter, as in MAE's fine-tuning. Its initial values are the
        fixed positions.
        """
        super().__init__()
        self.settings = settings
        self.grid = Grid.of(image_size, settings.patch_size)
        self.width = settings.width
        projection = PatchProjection(settings.width, settings.patch_size, settings.patch_bias)
        self.patch_embed = nn.ModuleDict({"proj": projection})
        self.cls_token = nn.Parameter(torch.empty(1, 1, settings.width))
        positions = sincos_positions(settings.width, self.grid)[None]
        self.learned_positions = learned_positions
        self.initial: dict[str, Initial] = {"pos_embed": positions} if learned_positions else {}
        if learned_positions:
            self.pos_embed = nn.Parameter(torch.empty(positions.shape))
        else:
            self.register_buffer("pos_embed", positions)
        self.blocks = nn.ModuleList(
            Block(settings.width, settings.heads, settings.attention, settings.mlp, settings.norm_eps)
            for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(settings.width, eps=settings.norm_eps)
        # Mean and std belong to the data set, not to the network: timm's state_dict has no keys for them.
        self.register_buffer("mean", torch.tensor(mean, device="cpu"), persistent=False)
        self.register_buffer("std", torch.tensor(std, device="cpu"), persistent=False)

    def initial_values(self) -> dict[str, Initial]:
        """Return the initial values of learned positions."""
        return self.initial

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        keep: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens (B, N, 1+K, D) after the final norm.

        Args:
            images: (B, H, W, 3), uint8. Floating-point images have to be normalised already, as mixed and erased images
                are; all their patches are encoded.
            visible: (B, N, K) patch ids; None stands for one view with every patch.
            keep: factors of drop path, see `run_blocks`.
            positions: (1 + L, D), those of the images' grid; None stands for the encoder's own positions, interpolated
                if the images have another size than the encoder's.
        """
        tokens = self.embed(images, visible, positions)
        return self.norm(run_blocks(self.blocks, tokens, self.settings, keep=keep))

    def embed(self, images: Tensor, visible: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Return the tokens (B, N, 1+K, D) that enter the first block; the arguments are those of `forward`."""
        grid = Grid.of(images.shape[1:3], self.settings.patch_size)
        if visible is None:
            every = torch.arange(grid.patches, device=images.device, dtype=torch.int32)
            visible = every.expand(images.shape[0], 1, -1)
        if positions is None:
            positions = resampled(self.pos_embed, self.grid, grid)[0]
        if not self.learned_positions:
            return self.patch_embed["proj"](images, visible, positions, self.cls_token[0, 0], self.mean, self.std)
        # The fused embedding has no gradient for positions.
        none = torch.zeros_like(positions)
        tokens = self.patch_embed["proj"](images, visible, none, self.cls_token[0, 0], self.mean, self.std)
        places = torch.cat([torch.zeros_like(visible[..., :1]), visible + 1], -1)
        return tokens + positions[places]

    def tokens(self, images: Images) -> Tensor:
        """Return the tokens (B, 1 + L, D) of whole images after the final norm: class token, then patches row by row.

        images: uint8 (B, H, W, 3), one or several images as tensors, arrays or Pillow images; see `batch_of`. They are
        not resized. Their size must be a multiple of the patch size, and may differ from the encoder's.
        """
        return self(batch_of(images, self.mean.device))[:, 0]

    def features(self, images: Images) -> Tensor:
        """Return the mean (B, D) of the patch tokens of whole images; see `tokens` for the images."""
        return self.tokens(images)[:, 1:].mean(1)

    def maps(self, images: Images, blocks: Sequence[int], keep: Tensor | None = None) -> list[Tensor]:
        """Return, for each of `blocks`, its output for the patches before the final norm: (B, D, rows, columns).

        Blocks are counted from 0, or from the last one as -1. See `tokens` for images, and `run_blocks` for `keep`
        (B, depth, 2). Raises ValueError for a block that does not exist.
        """
        depth = len(self.blocks)
        if wrong := [block for block in blocks if not -depth <= block < depth]:
            raise ValueError(f"block {wrong[0]} of {depth}: legal is 0 to {depth - 1}, or -1 for the last")
        batch = batch_of(images, self.mean.device)
        grid = Grid.of(batch.shape[1:3], self.settings.patch_size)
        embedded, found = self.embed(batch)[:, 0], dict[int, Tensor]()
        tokens = as_stream(embedded, self.settings.residual)
        wanted = [block % depth for block in blocks]
        for number, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            kept = None if keep is None else keep[:, number].to(tokens.dtype)
            tokens = call(block, self.settings.checkpointing, tokens, None, kept)
            if number in wanted:
                patches = tokens[:, 1:].to(embedded.dtype)
                found[number] = patches.transpose(1, 2).unflatten(2, (grid.rows, grid.columns))
        return [found[number] for number in wanted]
