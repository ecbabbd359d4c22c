"""L_rec, the reconstruction loss (method 2). Letters in shapes: as in `objective.loss`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mimae import kernels
from mimae.objective.costs import FP32, Cost, MicroBatch
from mimae.objective.loss import Inputs, Loss, Result


class Reconstruction(Loss):
    """Mean squared error of the predicted pixels: a local mean, over local batches of equal size."""

    def compute(self, inputs: Inputs, begun: Any, own: Any, factor: Tensor | float) -> Result:
        predictions, images, targets, mean, std, _ = inputs
        share, normalize = 1 / targets.numel(), self.settings.normalize_pixels
        rec = kernels.pixel_loss(predictions, images, targets, mean, std, normalize, scale=share)
        return Result([rec], {"rec": rec.detach()}, {})

    def cost(self, batch: MicroBatch) -> Cost:
        """Count the gradient of the predictions, which forward computes; without fusion it is the error in fp32."""
        sizes = batch.geometry
        predictions = batch.views * sizes.targets * sizes.grid.values
        kept = predictions * (FP32 if batch.ops == "plain" else batch.number)
        # At the end of forward the predictions still exist, and in bf16 the encoder's tokens in fp32. The plain
        # reference has the squared error and the patches in fp32, and later the two factors of its gradient.
        tokens = batch.views * (1 + sizes.visible) * batch.width * FP32 * (batch.number < FP32)
        work = predictions * batch.number + tokens
        if batch.ops == "plain":
            patches = batch.images * sizes.grid.patches * sizes.grid.values
            work = max(work + (predictions + patches) * FP32, 2 * predictions * FP32)
        return Cost(kept=kept, work=work, averaged=1)
