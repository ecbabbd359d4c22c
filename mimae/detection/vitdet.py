"""ViTDet: the plain encoder with windows, a simple feature pyramid, and Mask R-CNN's heads (Li et al., 2022).

The heads are torchvision's, with LayerNorm, because the running moments of BatchNorm would differ between ranks.

Letters in shapes: B images, H, W the canvas, P patch size, D width, C channels of the pyramid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from mimae.detection.examples import unpacked
from mimae.detection.settings import DetectSettings
from mimae.errors import UserError
from mimae.model.blocks import Attention, Block, run_blocks
from mimae.model.encoder import Encoder
from mimae.model.portable import Form, Graph
from mimae.model.units import Model
from mimae.randomness import Initial, Normal

LOSSES = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
"""Names of torchvision's losses, whose sum is minimised."""


class RelativeAttention(Attention):
    """Attention with decomposed relative positions: q . R_rows + q . R_columns is added to the logits."""

    def __init__(self, width: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__(width, heads, "sdpa")
        self.grid = grid
        self.rel_pos_h = nn.Parameter(torch.empty(2 * grid[0] - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.empty(2 * grid[1] - 1, width // heads))

    def initial_values(self) -> dict[str, Initial]:
        """Return zeros for the tables, so that they do not change the pretrained encoder at the start."""
        return {"rel_pos_h": 0.0, "rel_pos_w": 0.0}

    def forward(self, queries: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the attention of the queries (S, rows x columns, D) to each other, in the same shape."""
        assert context is None
        (packed,) = self.qkv(queries)
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in packed.chunk(3, -1))
        rows, columns = self.grid
        cells = q.unflatten(2, (rows, columns))
        by_row = torch.einsum("shrcd,rkd->shrck", cells, _relative(self.rel_pos_h, rows).to(q.dtype))
        by_column = torch.einsum("shrcd,ckd->shrck", cells, _relative(self.rel_pos_w, columns).to(q.dtype))
        bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(attended.transpose(1, 2).flatten(2))


def _relative(table: Tensor, length: int) -> Tensor:
    """Return the entries (length, length, d) of a table (2 length - 1, d) for each pair of query and key."""
    places = torch.arange(length, device=table.device)
    return table[places[:, None] - places[None, :] + length - 1]


class ViTDet(Model):
    """A detector of encoder, pyramid and heads. `forward` returns the losses, `detect` returns the objects."""

    evaluations = ("detect",)

    def __init__(self, encoder: Encoder, settings: DetectSettings, classes: int) -> None:
        super().__init__()
        model, grid = encoder.settings, encoder.grid
        self.canvas = (grid.rows * model.patch_size, grid.columns * model.patch_size)
        self.encoder = encoder
        # The pyramid has its own norms, so the encoder's final norm is removed.
        self.encoder.norm = nn.Identity()  # type: ignore[assignment]
        self.windows = _windows(len(encoder.blocks), settings)
        if settings.relative_positions:
            for block, window in zip(encoder.blocks, self.windows):
                side = (window, window) if window else (grid.rows, grid.columns)
                assert isinstance(block, Block)
                block.attn = RelativeAttention(model.width, model.heads, side)
        self.pyramid = Pyramid(model.width, settings.width)
        self.rpn, self.heads = _rpn(model.patch_size, settings), _heads(model.patch_size, settings, classes)

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks of the encoder."""
        return tuple(self.encoder.blocks)

    def maps(self, images: Tensor, keep: Tensor | None = None) -> dict[str, Tensor]:
        """Return maps (B, C, H / stride, W / stride) of strides P/4, P/2, P, 2P, 4P for images uint8 (B, H, W, 3)."""
        grid = self.encoder.grid
        tokens = self.encoder.embed(images)[:, 0, 1:].unflatten(1, (grid.rows, grid.columns))
        for i, window in enumerate(self.windows):
            parts = _in_windows(tokens, window) if window else tokens.flatten(1, 2)
            # `run_blocks` processes several views per image; here each window is an image with one view.
            kept = None if keep is None else keep[:, i : i + 1].repeat_interleave(len(parts) // len(tokens), 0)
            block = self.encoder.blocks[i : i + 1]
            parts = run_blocks(block, parts[:, None], self.encoder.settings, keep=kept)[:, 0]
            shape = (grid.rows, grid.columns)
            tokens = _from_windows(parts, window, shape) if window else parts.unflatten(1, shape)
        # Anchors get the dtype of the maps, and bf16 is too imprecise for coordinates.
        return {name: each.float() for name, each in self.pyramid(tokens.permute(0, 3, 1, 2)).items()}

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        classes: Tensor,
        count: Tensor,
        masks: Tensor | None,
        keep: Tensor | None,
        word: Tensor,
    ) -> dict[str, Tensor]:
        """Return torchvision's losses by name.

        Args:
            images: uint8 (B, H, W, 3).
            sizes: (B, 2), height and width of the image on each canvas.
            boxes: (B, M, 4).
            classes: (B, M), from 1 on.
            count: (B,), the number of objects.
            masks: packed to bits, uint8 (B, M, H, W / 8).
            keep: factors of drop path (B, blocks, 2).
            word: seed of the samplers of anchors and proposals.
        """
        targets: list[dict[str, Tensor]] = []
        for i, number in enumerate(count.tolist()):
            targets.append({"boxes": boxes[i, :number], "labels": classes[i, :number]})
            if masks is not None:
                targets[i]["masks"] = unpacked(masks[i, :number], self.canvas[1])
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(word))
            maps, listed = self.maps(images, keep), self._listed(images, sizes)
            proposals, losses = self.rpn(listed, maps, targets)
            _, more = self.heads(maps, proposals, listed.image_sizes, targets)
        return losses | more

    def detect(self, images: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        """Return the detections of each image, the best first.

        They are boxes (n, 4) in pixels of the canvas, labels (n,) from 1 on, scores (n,), and masks (n, 1, 28, 28)
        inside the boxes.
        """
        maps, listed = self.maps(images), self._listed(images, sizes)
        proposals, _ = self.rpn(listed, maps)
        found, _ = self.heads(maps, proposals, listed.image_sizes)
        return found

    def example_loss(self, images: Tensor) -> Tensor:
        """Return a number that depends on what a training step computes for images (B, H, W, 3), without their objects:
        the maps, all anchors, and as many regions as the samplers take at most."""
        maps = self.maps(images)
        heads = self.heads
        regions = len(images) * heads.fg_bg_sampler.batch_size_per_image
        parts = [each for level in self.rpn.head(list(maps.values())) for each in level]
        parts += heads.box_predictor(heads.box_head(_regions(maps, regions, heads.box_roi_pool.output_size[0])))
        if heads.mask_head is not None:
            objects = int(regions * heads.fg_bg_sampler.positive_fraction)
            seen = _regions(maps, objects, heads.mask_roi_pool.output_size[0])
            parts.append(heads.mask_predictor(heads.mask_head(seen)))
        return torch.stack([each.sum() for each in parts]).sum()

    def graph(self, form: Form) -> Graph:
        """Raise UserError: there is no graph of a detector."""
        raise UserError(
            "torch.export cannot follow a detector: how torchvision's batched_nms (torchvision/ops/boxes.py) and its "
            "heads compute depends on the number of boxes; mimae predict writes what it finds"
        )

    def _listed(self, images: Tensor, sizes: Tensor) -> ImageList:
        # The heads read only sizes: that of the batch for the strides, those of the images for their borders.
        return ImageList(images.permute(0, 3, 1, 2), [(height, width) for height, width in sizes.tolist()])


def _regions(maps: dict[str, Tensor], count: int, side: int) -> Tensor:
    """Return regions (count, C, side, side) that depend on the maps."""
    levels = torch.stack([maps[name].mean((0, 2, 3)) for name in ("0", "1", "2", "3")]).mean(0)
    return levels[None, :, None, None].expand(count, -1, side, side)


class Pyramid(nn.Module):
    """The simple feature pyramid, which converts one map of stride P to maps of strides P/4, P/2, P, 2P and 4P."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 2, 2),
            LayerNorm2d(width // 2),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, 2),
        )
        self.up2 = nn.ConvTranspose2d(width, width // 2, 2, 2)
        self.same, self.down2 = nn.Identity(), nn.MaxPool2d(2, 2, ceil_mode=True)
        self.out = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inner, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for inner in (width // 4, width // 2, width, width)
        )

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return maps by name, "0" to "3" and "pool", for tokens (B, D, rows, columns)."""
        levels = (self.up4, self.up2, self.same, self.down2)
        maps = {str(i): out(level(tokens)) for i, (level, out) in enumerate(zip(levels, self.out))}
        return maps | {"pool": F.max_pool2d(maps["3"], 1, 2)}


def _windows(depth: int, settings: DetectSettings) -> list[int]:
    """Return the side of each block's windows; 0 for a block that attends to the whole image."""
    if not settings.window:
        return [0] * depth
    number = min(settings.global_blocks, depth)
    whole = {(i + 1) * depth // number - 1 for i in range(number)}
    return [0 if i in whole else settings.window for i in range(depth)]


def _in_windows(tokens: Tensor, side: int) -> Tensor:
    """Divide tokens (B, rows, columns, D), padded with zeros, into windows (B windows, side x side, D)."""
    rows, columns = tokens.shape[1:3]
    padded = F.pad(tokens, (0, 0, 0, -columns % side, 0, -rows % side))
    cells = padded.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return cells.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _from_windows(parts: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """Invert `_in_windows`, and remove the padding."""
    rows, columns = grid
    down, across = -(-rows // side), -(-columns // side)
    cells = parts.unflatten(1, (side, side)).unflatten(0, (-1, down, across)).transpose(2, 3)
    return cells.flatten(3, 4).flatten(1, 2)[:, :rows, :columns]


def _rpn(patch: int, settings: DetectSettings) -> RegionProposalNetwork:
    """Return the network that proposes boxes. Each position of each map has anchors of 8 strides in three shapes."""
    strides = [patch / 4, patch / 2, patch, 2 * patch, 4 * patch]
    with torch.device("cpu"):  # The anchors are constants that are not buffers.
        anchors = AnchorGenerator(tuple((int(8 * stride),) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
    head = _start(RPNHead(settings.width, 3, conv_depth=2), Normal(0.01))
    # These numbers are those of torchvision's Mask R-CNN.
    counts = {"training": 2000, "testing": 1000}
    return RegionProposalNetwork(anchors, _exact(head), 0.7, 0.3, 256, 0.5, counts, counts, 0.7)


def _heads(patch: int, settings: DetectSettings, classes: int) -> RoIHeads:
    """Return the heads that classify proposals, refine their boxes and predict their masks."""
    width = settings.width
    box = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [settings.box_width], norm_layer=LayerNorm2d)
    predictor = FastRCNNPredictor(settings.box_width, classes + 1)
    _start(box, None)
    _start(predictor.cls_score, Normal(0.01))
    _start(predictor.bbox_pred, Normal(0.001))
    masks: dict[str, Any] = {}
    if settings.masks:
        masks = {
            "mask_roi_pool": _pool(patch, 14),
            "mask_head": _start(MaskRCNNHeads(width, [width] * 4, 1, norm_layer=LayerNorm2d), None),
            "mask_predictor": _exact(_start(MaskRCNNPredictor(width, width, classes + 1), None)),
        }
    return RoIHeads(
        _pool(patch, 7), box, _exact(predictor), 0.5, 0.5, 512, 0.25, None, settings.score, 0.5, 100, **masks
    )


def _pool(patch: int, side: int) -> MultiScaleRoIAlign:
    """Return torchvision's pooling of regions to side x side with the strides of the pyramid. By itself it would infer
    them from the first batch that it sees, and keep them: from the size of the largest jittered image."""
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], side, 2)
    strides = [patch / 4, patch / 2, patch, 2 * patch]
    first, last = (round(math.log2(stride)) for stride in (strides[0], strides[-1]))
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(first, last, pool.canonical_scale, pool.canonical_level)
    return pool


def _start(module: nn.Module, weights: Initial | None) -> Any:
    """Set the initial values of the module's matrices, and return the module.

    They are `weights`, or by default normal with deviation sqrt(2 / inputs of an output), as for ReLU.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            given = weights if weights is not None else Normal(math.sqrt(2 / (layer.weight[0].numel() or 1)))
            layer.initial_values = lambda given=given: {"weight": given}  # type: ignore[assignment]
    return module


def _exact(module: nn.Module) -> Any:
    """Make the outputs of a module fp32, because coordinates and logits need it, and return the module."""
    module.register_forward_hook(lambda _, __, output: _as_float(output))
    return module


def _as_float(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, list | tuple):
        return type(output)(_as_float(each) for each in output)
    return output
