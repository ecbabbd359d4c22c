"""An encoder with a linear classifier.

Letters in shapes: B images, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mimae.model.batch_norm import GlobalBatchNorm
from mimae.model.encoder import Encoder
from mimae.model.portable import Form, Graph, head_graph
from mimae.model.units import Model
from mimae.randomness import Initial, Normal


class Head(nn.Linear):
    """A linear classifier whose initial weights are normal with deviation `std`."""

    def __init__(self, width: int, classes: int, std: float) -> None:
        super().__init__(width, classes)
        self.std = std

    def initial_values(self) -> dict[str, Initial]:
        """Return the initial values that differ from the rules of `randomness.initialise`."""
        return {"weight": Normal(self.std)}


class Classifier(Model):
    """An encoder, pooling of its tokens, a norm and a linear layer.

    The names are those of timm's ViT, with the prefix `encoder.` for the encoder. `fc_norm` replaces the encoder's own
    final norm.
    """

    evaluations = ("logits", "pooled")

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        *,
        pooling: Literal["mean", "class_token"],
        norm: Literal["fc_norm", "batch_norm", "none"],
        init_std: float,
    ) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        if norm == "fc_norm":
            encoder.norm = nn.Identity()  # type: ignore[assignment]
            self.fc_norm: nn.Module = nn.LayerNorm(encoder.width, eps=1e-6)
        else:
            self.fc_norm = GlobalBatchNorm(encoder.width) if norm == "batch_norm" else nn.Identity()
        self.head = Head(encoder.width, classes, init_std)

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks of the encoder."""
        return tuple(self.encoder.blocks)

    def forward(self, images: Tensor, targets: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy, fp32.

        Args:
            images: (B, H, W, 3), uint8 or normalised, or what `pooled` returned for them, (B, D).
            targets: (B, C), a distribution over the classes for each image.
            keep: (B, depth, 2), see `drop_path.keep_paths`.
        """
        logits = self.logits(images, keep)
        with torch.autocast(images.device.type, enabled=False):
            return nn.functional.cross_entropy(logits.float(), targets)

    def logits(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the logits (B, C) of images, see `forward`."""
        return self.head(self.fc_norm(self.pooled(images, keep)))

    def pooled(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return what the norm and the classifier see of images, (B, D)."""
        return images if images.ndim == 2 else self._pool(self.encoder(images, keep=keep)[:, 0])

    def classified(self, tokens: Tensor) -> Tensor:
        """Return the logits (B, C) of an encoder's tokens (B, 1 + L, D)."""
        return self.head(self.fc_norm(self._pool(tokens)))

    def _pool(self, tokens: Tensor) -> Tensor:
        return tokens[:, 1:].mean(1) if self.pooling == "mean" else tokens[:, 0]

    def graph(self, form: Form) -> Graph:
        """Return the classifier in plain operators: images -> logits (B, C)."""
        parts = {"fc_norm": self.fc_norm, "head": self.head}
        return head_graph(self.encoder, form, parts, lambda tokens, _: self.classified(tokens), self.logits)
