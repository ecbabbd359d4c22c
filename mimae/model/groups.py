"""The optimizer's groups of MI-MAE's parameters."""

from __future__ import annotations

import torch

from mimae.optim.groups import Group, Rule, is_matrix
from mimae.optim.settings import OptimizerSettings


def groups(optimizer: OptimizerSettings, images: int, views: int) -> Rule:
    """Return the rule that assigns each parameter to a group.

    Matrices have weight decay, and so have tokens if `optimizer.decay_tokens` is set. The posterior V has a separate
    learning rate, is clipped separately (method 3) and has no weight decay. The learning rates scale with `images`, the
    number of images in the global batch, and `views`, the number of views of each image.
    """
    main = optimizer.peak(optimizer.learning_rate, images, views)
    posterior = optimizer.peak(optimizer.posterior_learning_rate or optimizer.learning_rate, images, views)

    def rule(name: str, shape: torch.Size) -> Group:
        if "objective.posterior." in name:
            return Group(posterior, 0.0, clip="posterior")
        if is_matrix(name, shape) or (optimizer.decay_tokens and name.endswith("token")):
            return Group(main, optimizer.weight_decay, adapt=True)
        return Group(main, 0.0)

    return rule
