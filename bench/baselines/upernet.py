"""A plain training step of a segmenter: timm's ViT with the heads of UperNet in transformers, torch's AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from mimae.bench.baselines.vit import vit
from mimae.config.recipe import SegmentRecipe
from mimae.segmentation.labels import IGNORED


class PlainUperNet(nn.Module):
    """Model and optimizer with the sizes and settings of a recipe. The norms of its heads are BatchNorm."""

    def __init__(self, recipe: SegmentRecipe) -> None:
        super().__init__()
        model, settings, data = recipe.model, recipe.segment, recipe.data
        width, self.blocks = model.width, settings.maps(model.depth)
        self.vit = vit(recipe, num_classes=0, fc_norm=False, drop_path_rate=recipe.finetune.drop_path)
        enlarged = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2), nn.BatchNorm2d(width), nn.GELU())
        enlarged.append(nn.ConvTranspose2d(width, width, 2, 2))
        levels = (enlarged, nn.ConvTranspose2d(width, width, 2, 2), nn.Identity(), nn.MaxPool2d(2, 2))
        self.pyramid = nn.ModuleList(levels)
        config: Any = UperNetConfig(hidden_size=settings.width)
        config.num_labels = settings.number
        self.head, self.auxiliary = UperNetHead(config, [width] * 4), UperNetFCNHead(config, [width] * 4)
        self.auxiliary_weight = settings.auxiliary
        rate = recipe.optimizer.peak(recipe.optimizer.learning_rate, recipe.schedule.batch_size, 1)
        self.optimizer = torch.optim.AdamW(self.parameters(), rate)
        self.mean, self.std = (torch.tensor(each)[:, None, None] for each in (data.mean, data.std))

    def step(self, images: Tensor, classes: Tensor) -> float:
        """Take a step on images uint8 (B, H, W, 3) with classes (B, H, W); return the loss."""
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        maps = self.vit.forward_intermediates(pixels, indices=list(self.blocks), intermediates_only=True)
        levels = [level(each) for level, each in zip(self.pyramid, maps)]
        loss = self._loss(self.head(levels), classes)
        loss = loss + self.auxiliary_weight * self._loss(self.auxiliary(levels), classes)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        logits = F.interpolate(logits, classes.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, classes, ignore_index=IGNORED)
