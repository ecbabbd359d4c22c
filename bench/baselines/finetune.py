"""A plain fine-tuning step of a classifier: timm's model, mixup, erasing and groups, torch's AdamW."""

from __future__ import annotations

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor

from mimae.bench.baselines.vit import vit
from mimae.config.recipe import ClassifyRecipe


class Finetune:
    """Model and optimizer with the sizes and settings of a recipe."""

    def __init__(self, recipe: ClassifyRecipe, classes: int) -> None:
        augment, finetune, optimizer = recipe.augment, recipe.finetune, recipe.optimizer
        self.model = vit(recipe, num_classes=classes, global_pool="avg", drop_path_rate=finetune.drop_path)
        groups = param_groups_layer_decay(self.model, optimizer.weight_decay, layer_decay=finetune.layer_decay)
        rate = optimizer.peak(optimizer.learning_rate, recipe.schedule.batch_size, 1)
        for group in groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer = torch.optim.AdamW(groups, betas=optimizer.betas)
        self.mixup = Mixup(
            augment.mixup,
            augment.cutmix,
            prob=augment.mix,
            switch_prob=augment.cutmix_share,
            label_smoothing=augment.label_smoothing,
            num_classes=classes,
        )
        self.erase = RandomErasing(augment.erase, mode="pixel", device="cpu")
        self.mean, self.std = (torch.tensor(each)[:, None, None] for each in (recipe.data.mean, recipe.data.std))

    def step(self, images: Tensor, labels: Tensor) -> float:
        """Take a step on images uint8 (B, H, W, 3) with labels (B,); return the loss."""
        pixels = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        pixels, targets = self.mixup(self.erase(pixels), labels)
        loss: Tensor = SoftTargetCrossEntropy()(self.model(pixels), targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
