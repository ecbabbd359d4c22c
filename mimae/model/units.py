"""The interface of a model that engines train."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mimae.errors import UserError
from mimae.model.portable import Form, Graph
from mimae.randomness import materialise


class Model(nn.Module):
    """A model that any engine can train: its forward takes the tensors of a micro-batch."""

    evaluations: ClassVar[tuple[str, ...]] = ()
    """Names of the model's other forward methods, which evaluation calls."""

    num_sizes: int = 1
    """Number of sizes of images that the model is trained on; a unit is compiled for each."""

    @abstractmethod
    def units(self) -> Sequence[nn.Module]:
        """Return the blocks in the order in which they compute. Each is compiled and sharded over ranks separately."""

    def graph(self, form: Form) -> Graph:
        """Return the model in plain operators, for `mimae export`. Raises UserError where it cannot be one."""
        raise UserError(f"a {type(self).__name__} has no graph: --to onnx and --to torch cannot hold it")


def fill(model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device | str) -> None:
    """Allocate a model on the meta device on `device`, with the weights `tensors`.

    Raises ValueError before memory is taken if names or shapes differ: settings from elsewhere may claim any size.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in ours | theirs:
        if name not in theirs:
            raise ValueError(f"{name} is missing")
        if name not in ours:
            raise ValueError(f"the model has no {name}")
        if theirs[name] != ours[name]:
            raise ValueError(f"{name} has the shape {theirs[name]}, and the model needs {ours[name]}")
    materialise(model, device)
    model.load_state_dict(tensors)
