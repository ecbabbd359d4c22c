"""Base class of the tasks that train on a pretrained encoder: classification, segmentation, detection.

The settings of `Transfer` are the sections `finetune` and `evaluation`. It offers

* `encoder()`: the encoder for the task's model, which has to name it `encoder`. Its positions are learned. Parameters
  that `finetune.freeze` names are frozen: they have no gradient and no optimizer state, and do not change;
* `group`: the optimizer's groups with layer-wise decay; parameters outside `encoder` have the full learning rate;
* `found`: the last evaluation, which a step clears;
* `paths(batch)`: the factors of drop path, for `Encoder.forward(images, keep=...)`;
* `obstacles`: the obstacles for attention and frozen parameters on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mimae import distributed
from mimae.config.recipe import TransferRecipe
from mimae.data.loading.batch import Batch
from mimae.engines.base import M, Obstacles
from mimae.model import attention
from mimae.model.attention_choice import Call
from mimae.model.drop_path import keep_paths
from mimae.model.encoder import Encoder
from mimae.model.geometry import Grid
from mimae.optim.groups import Group
from mimae.optim.layer_decay import groups, layer_of
from mimae.train.task import Task

__all__ = ["Transfer"]


class Transfer(Task[M]):
    """A task whose model has a pretrained `encoder`."""

    recipe: TransferRecipe
    found: Any = None
    """The last evaluation since the last step, from which `details` is made; None if there is none."""

    def stepped(self, model: M, shown: Mapping[str, Tensor], skipped: Tensor) -> None:
        self.found = None

    def encoder(self) -> Encoder:
        """Return the encoder, built on torch's default device: the meta device in `outline`."""
        data, model, freeze = self.recipe.data, self.recipe.model, self.recipe.finetune.freeze
        encoder = Encoder(model, data.size_hw, data.mean, data.std, learned_positions=True)
        frozen = {"none": -1, "all": model.depth + 1}.get(str(freeze), freeze)
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(layer_of(f"encoder.{name}", model.depth) > int(frozen))
        return encoder

    def group(self, name: str, shape: torch.Size) -> Group:
        finetune, decay = self.recipe.finetune, self.recipe.optimizer.weight_decay
        return groups(self.peak, decay, finetune.layer_decay, self.recipe.model.depth)(name, shape)

    def paths(self, batch: Batch) -> Tensor | None:
        """Return the factors (B, depth, 2) of the paths of the encoder's blocks in training; None stands for 1."""
        recipe = self.recipe
        return keep_paths(recipe.seed, batch.epoch, batch.sample_ids, recipe.finetune.drop_path, recipe.model.depth)

    def warning(self, model: M, step: int, steps: int, steps_per_epoch: int) -> str | None:
        """Return a warning if the evaluation of this epoch left images out."""
        details = self.details()
        if details is None or not details.left_out:
            return None
        return (
            f"in data.val_path {details.left_out:,} of {details.images + details.left_out:,} images could not be used"
        )

    def example_images(self, images: int) -> Tensor:
        """Return uint8 (B, H, W, 3)."""
        return torch.empty(images, *self.recipe.data.size_hw, 3, dtype=torch.uint8)

    def attention_calls(self) -> list[Call]:
        model, schedule = self.recipe.model, self.recipe.schedule
        sequences = max(1, schedule.batch_size // (schedule.accumulate * distributed.world_size()))
        tokens = 1 + Grid.of(self.recipe.data.size_hw, model.patch_size).patches
        return [Call(sequences, model.heads, tokens, tokens, model.width // model.heads, model.depth)]

    def obstacles(self, device: torch.device) -> Obstacles:
        model, finetune, engine = self.recipe.model, self.recipe.finetune, self.recipe.engine
        dtype = torch.bfloat16 if self.recipe.precision == "bf16" else torch.float32
        is_partitioned = engine.kind.startswith("zero") and finetune.freeze != "none"
        return {
            f"model.attention={model.attention}": attention.obstacle(
                model.attention, device, dtype, {model.width // model.heads}
            ),
            f"finetune.freeze={finetune.freeze}": (
                f"DeepSpeed does not support parameters that are not trained (engine.kind={engine.kind}); "
                "use engine.kind=ddp or fsdp"
                if is_partitioned
                else None
            ),
        }
