"""A plain training step of torchvision's Mask R-CNN, on timm's ViT with a simple feature pyramid."""

from __future__ import annotations

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from mimae.bench.baselines.vit import vit
from mimae.config.recipe import DetectRecipe
from mimae.detection.vitdet import Pyramid


class Backbone(nn.Module):
    """timm's ViT, all of whose blocks attend to the whole image, and the pyramid."""

    def __init__(self, recipe: DetectRecipe) -> None:
        super().__init__()
        model, self.out_channels = recipe.model, recipe.detect.width
        self.vit = vit(recipe, num_classes=0, class_token=False, global_pool="")
        self.vit.norm = nn.Identity()
        self.grid = tuple(side // model.patch_size for side in recipe.data.size_hw)
        self.pyramid = Pyramid(model.width, recipe.detect.width)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.pyramid(self.vit(pixels).transpose(1, 2).unflatten(2, self.grid))  # type: ignore[no-any-return]


class PlainMaskRCNN:
    """Model and optimizer with the sizes of a recipe."""

    def __init__(self, recipe: DetectRecipe, classes: int) -> None:
        width, size = recipe.detect.width, recipe.data.size_hw
        anchors = tuple((round(8 * recipe.model.patch_size * share),) for share in (0.25, 0.5, 1, 2, 4))
        self.model = MaskRCNN(
            *(Backbone(recipe), None, min(size), max(size), recipe.data.mean, recipe.data.std),
            rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * len(anchors)),
            rpn_head=RPNHead(width, 3, conv_depth=2),
            box_head=FastRCNNConvFCHead((width, 7, 7), [width] * 4, [recipe.detect.box_width], LayerNorm2d),
            box_predictor=FastRCNNPredictor(recipe.detect.box_width, classes + 1),
            mask_head=MaskRCNNHeads(width, [width] * 4, 1, LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(width, width, classes + 1),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), recipe.optimizer.learning_rate)

    def step(self, images: Tensor, targets: list[dict[str, Tensor]]) -> float:
        """Take a step on images uint8 (B, H, W, 3) with torchvision's targets; return the loss."""
        loss = torch.stack(list(self.model(list(images.permute(0, 3, 1, 2).float() / 255), targets).values())).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
