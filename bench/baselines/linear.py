"""A plain training step of a linear classifier on a frozen encoder: timm's model and its LARS, torch's BatchNorm."""

from __future__ import annotations

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn

from mimae.bench.baselines.vit import vit
from mimae.config.recipe import ClassifyRecipe


class Linear:
    """Model and optimizer with the sizes and settings of a recipe."""

    def __init__(self, recipe: ClassifyRecipe, classes: int) -> None:
        optimizer = recipe.optimizer
        self.encoder = vit(recipe, num_classes=0, global_pool="avg", fc_norm=False)
        width = self.encoder.embed_dim
        self.head = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, classes))
        rate = optimizer.peak(optimizer.learning_rate, recipe.schedule.batch_size, 1)
        self.optimizer = Lars(self.head.parameters(), rate, momentum=optimizer.betas[0], always_adapt=True)
        self.mean, self.std = (torch.tensor(each)[:, None, None] for each in (recipe.data.mean, recipe.data.std))

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Take a step on images uint8 (B, H, W, 3) with labels (B,); return the loss."""
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        with torch.no_grad():
            features = self.encoder(pixels)
        loss = nn.functional.cross_entropy(self.head(features), labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
