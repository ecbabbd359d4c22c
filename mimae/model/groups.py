"""The optimizer's groups of MI-MAE's parameters."""

from __future__ import annotations

import torch

from mimae.optim.groups import Group, Rule, is_matrix
from mimae.optim.settings import OptimizerSettings


def groups(optimizer: OptimizerSettings, images: int, views: int) -> Rule:
    """Return the rule: weight decay for matrices, and for tokens where it is asked for; V has a learning rate of its
    own, is clipped apart from the rest (method 3) and is not decayed. `images` of the global batch, each with so many
    `views`, scale the rates.
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
