"""The task of pretraining: MI-MAE learns to predict the hidden patches of each view of an image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mimae import distributed
from mimae.config.recipe import Recipe
from mimae.data.loading.batch import Batch
from mimae.data.loading.loader import evaluation_batches
from mimae.engines.base import Engine, Obstacles
from mimae.evaluate import share
from mimae.evaluate.knn import knn_accuracy
from mimae.evaluate.samples import shared_labels
from mimae.kernels import pixel_loss
from mimae.model import attention_choice
from mimae.model.attention_choice import Call
from mimae.model.groups import groups
from mimae.model.masking import views
from mimae.model.mimae import MIMAE, obstacles, outline
from mimae.objective.objective import Losses
from mimae.objective.terms import DIAGNOSTICS, ESTIMATES, LOSSES, active
from mimae.optim.groups import Group
from mimae.optim.resolution import Size
from mimae.plan.communication import bytes_sent
from mimae.plan.flops import step_flops
from mimae.telemetry import pictures
from mimae.train.task import Result, Task
from mimae.train.trainer import Outcome, train

VALIDATION_IMAGES = 2048
"""Number of validation images, and of training images, that the evaluation during pretraining uses."""

PICTURED = 8
"""Number of images in a picture of reconstructions."""

MEASURED = 32
"""Number of training images on which a decoder from model.init is measured."""

_BATCH = 64


def pretrain(recipe: Recipe) -> Outcome:
    """Pretrain by a recipe; see `trainer.train`."""
    return train(Pretrain(recipe))


def engine_of(recipe: Recipe, device: torch.device) -> Engine[MIMAE]:
    """Return the engine of a recipe with the initial weights of its seed; model.init is ignored."""
    seeded = recipe.model.model_copy(update={"init": None})
    return Pretrain(recipe.model_copy(update={"model": seeded})).engine(device)


class Pretrain(Task[MIMAE]):
    """The task of pretraining: the losses of the objective on masked views.

    It is evaluated by the reconstruction loss and by nearest neighbours on data.val_path.
    """

    losses = LOSSES
    estimates = ESTIMATES
    diagnostics = DIAGNOSTICS
    gauges = ("gate",)
    measures = Recipe.measures

    @property
    def views(self) -> int:
        return self.recipe.masking.num_masks

    recipe: Recipe

    def check(self) -> None:
        super().check()
        if self.validation is not None and self.source.labels is not None and self.validation.labels is not None:
            shared_labels(self.source, self.validation)  # This raises UserError for classes that do not match.

    def obstacles(self, device: torch.device) -> Obstacles:
        return obstacles(self.recipe, device)

    def outline(self) -> MIMAE:
        return outline(self.recipe)

    def group(self, name: str, shape: torch.Size) -> Group:
        return groups(self.recipe.optimizer, self.recipe.schedule.batch_size, self.views)(name, shape)

    def started(self, model: MIMAE, device: torch.device) -> None:
        """Measure whether a decoder from model.init predicts normalised or raw pixels, which no file records."""
        if self.fit is None or not self.fit.has_decoder:
            return
        ids = share.evenly(self.source, MEASURED)
        (batch,) = evaluation_batches(self.recipe.data, self.source, len(ids), ids)
        images, visible, targets = self.inputs(batch.to(device))
        predictions = self._predict(model, images, visible, targets)
        mean, std = model.encoder.mean, model.encoder.std
        losses, shares = {}, {}
        for kind, normalize in (("normalised", True), ("raw", False)):
            loss, trivial = (
                pixel_loss(each, images, targets, mean, std, normalize).item() / targets.numel()
                for each in (predictions, torch.zeros_like(predictions))
            )
            losses[kind], shares[kind] = loss, loss / trivial
        self.fit.measured(losses, shares, self.recipe.objective.normalize_pixels, len(ids))

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (B, H, W, 3), visible (B, N, K) and targets (B, N, M)."""
        size_hw = batch.images.shape[1:3]
        visible, targets = views(self.recipe, self.recipe.seed, batch.epoch, batch.sample_ids, size_hw)
        return batch.images, visible, targets

    def result(self, output: Losses) -> Result:
        return Result(output.loss, output.columns, output.latents)

    def stepped(self, model: MIMAE, shown: Mapping[str, Tensor], skipped: Tensor) -> None:
        model.objective.gate.update(shown["rec"], skipped)

    def gauge(self, model: MIMAE) -> dict[str, float]:
        return {"gate": model.objective.gate.weight.item()}

    def evaluate(self, model: MIMAE, device: torch.device) -> dict[str, float]:
        """Return kNN accuracy and reconstruction loss on data.val_path, with the masks of epoch 0."""
        recipe, validation = self.recipe, self.validation
        if validation is None:
            return {}
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        ids = share.evenly(validation, VALIDATION_IMAGES)
        for batch, count in share.batches(recipe.data, validation, ids, device, _BATCH):
            images, visible, targets = self.inputs(batch)
            predictions = self._predict(model, images, visible, targets)
            if count:
                rec = self._pixel_loss(model, predictions[:count], images[:count], targets[:count])
                sums += torch.stack([rec.double(), rec.new_tensor(targets[:count].numel(), dtype=torch.float64)])
        rec, terms = distributed.all_sum(sums).tolist()
        measures = {"val_rec": rec / terms}
        if self.source.labels is not None and validation.labels is not None:
            measures["knn"] = knn_accuracy(model, recipe.data, self.source, validation, limit=VALIDATION_IMAGES)
        return measures

    def sample_losses(self, model: MIMAE, batch: Batch) -> list[float]:
        """Return L_rec of each sample of a batch."""
        images, visible, targets = self.inputs(batch)
        predictions = self._predict(model, images, visible, targets)
        found = []
        for i in range(len(images)):
            one = slice(i, i + 1)
            total = self._pixel_loss(model, predictions[one], images[one], targets[one])
            found.append(total.item() / targets[one].numel())
        return found

    def picture(self, model: MIMAE, device: torch.device) -> bytes | None:
        """Return reconstructions of the first images of the validation set, or of the training set."""
        recipe, source = self.recipe, self.validation or self.source
        # Every rank takes the same images, because forwards are collectives under some engines.
        ids = share.evenly(source, PICTURED)
        (batch,) = evaluation_batches(recipe.data, source, len(ids), ids)
        images, visible, targets = self.inputs(batch.to(device))
        predictions = model.predict(images, visible, targets)
        if distributed.rank() > 0:
            return None
        drawn = pictures.reconstructions(
            images,
            visible,
            targets,
            predictions,
            patch=recipe.model.patch_size,
            mean=recipe.data.mean,
            std=recipe.data.std,
            normalize=recipe.objective.normalize_pixels,
        )
        return pictures.reconstruction_grid(images, *drawn, recipe.objective.normalize_pixels)

    def warning(self, model: MIMAE, step: int, steps: int, steps_per_epoch: int) -> str | None:
        objective = self.recipe.objective
        is_first_past_a_quarter = (step - steps_per_epoch) * 4 < steps <= step * 4
        is_gated = any(term.is_gated for term in active(objective))
        if not (is_first_past_a_quarter and is_gated and model.objective.gate.weight.item() == 0):
            return None
        return (
            f"the gate is still closed after a quarter of the run: L_rec is not below objective.gate_loss="
            f"{objective.gate_loss}, so the MI terms have no effect; raise it, or set it to null"
        )

    def flops(self, size_hw: Size) -> float:
        return step_flops(self.recipe, size_hw) / self.recipe.schedule.batch_size

    def attention_calls(self) -> list[Call]:
        return attention_choice.calls(self.recipe, distributed.world_size())

    def bytes_sent(self, device: torch.device) -> int:
        return bytes_sent(self.recipe, distributed.world_size(), device)

    def batch_in_words(self) -> str:
        return f"{self.recipe.schedule.batch_size} x {self.views} views"

    def _predict(self, model: MIMAE, images: Tensor, visible: Tensor, targets: Tensor) -> Tensor:
        """Return predictions, computed in the run's precision."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return model.predict(images, visible, targets)

    def _pixel_loss(self, model: MIMAE, predictions: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of L_rec over all targets."""
        mean, std = model.encoder.mean, model.encoder.std
        return pixel_loss(predictions, images, targets, mean, std, self.recipe.objective.normalize_pixels)
