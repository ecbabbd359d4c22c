"""Streams of random numbers for masks, crops, flips, order, replacement and initial weights.

No part of a run uses a stateful generator: each number is a pure function of the seed and of its purpose. So resuming
needs no generator state, and every sharding of a run draws the same numbers (method 1).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimae.kernels import philox_words


class Purpose(IntEnum):
    """Purpose of a stream; it is part of the counter, so that no two uses share a word."""

    MASK = 1
    CROP = 2
    FLIP = 3
    ORDER = 4
    REPLACEMENT = 5
    INITIALISATION = 6
    AUGMENT = 7
    ERASE = 8
    MIX = 9
    DROP_PATH = 10
    SAMPLER = 11
    SUBSET = 12
    DROPOUT = 13


def words(seed: int, purpose: Purpose, epoch: int, ids: Tensor, count: int, first: int = 0) -> Tensor:
    """Return words first .. first + count - 1 of the streams of `ids` (n,): int64 (n, count) in [0, 2^32)."""
    return philox_words(seed, int(purpose), epoch, ids, count, first)


def uniform(words: Tensor) -> Tensor:
    """Return words as float64 in the open interval (0, 1): (w + 1/2) / 2^32."""
    return (words.to(torch.float64) + 0.5) / 2.0**32


def normal(u: Tensor, std: float = 1.0) -> Tensor:
    """Return numbers of the normal distribution from numbers uniform in (0, 1)."""
    return std * math.sqrt(2.0) * torch.erfinv(2 * u - 1)


def _stream_id(name: str) -> int:
    """Return the 64-bit id of a parameter's stream, as a signed integer."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def parameter_uniform(seed: int, name: str, start: int, count: int, device: torch.device) -> Tensor:
    """Return the uniform numbers of elements start .. start + count - 1 of the parameter `name`, float64 (count,)."""
    ids = torch.tensor([_stream_id(name)], device=device)
    return uniform(words(seed, Purpose.INITIALISATION, 0, ids, count, start)[0])


def materialise(module: nn.Module, device: torch.device | str) -> None:
    """Allocate the parameters of a module on the meta device on `device`, uninitialised, and move its buffers there.

    This avoids the default initialisation. Raises ValueError for a buffer on the meta device, whose constants would be
    lost.
    """
    if lost := [name for name, buffer in module.named_buffers() if buffer.is_meta]:
        raise ValueError(
            f"buffers of a {type(module).__name__} have no values: {', '.join(lost)}; build them on the CPU"
        )
    module._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))


class Part(NamedTuple):
    """A rank's part of a parameter: a contiguous range of elements of the flattened parameter."""

    values: Tensor
    """The elements, in the memory of the model and in any shape."""
    start: int
    """Position of the first element in the whole parameter."""
    shape: torch.Size
    """Shape of the whole parameter."""

    def of(self, whole: Tensor) -> Tensor:
        """Return the same elements of another tensor of the whole shape."""
        return whole.flatten()[self.start : self.start + self.values.numel()].view(self.values.shape)


def whole_parts(module: nn.Module) -> dict[str, Part]:
    """Return every parameter of a module, by name, for a rank that has whole parameters."""
    return {name: Part(parameter, 0, parameter.shape) for name, parameter in module.named_parameters()}


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class Uniform(NamedTuple):
    """An initial value that is uniform in ±`bound`."""

    bound: float


class Normal(NamedTuple):
    """An initial value from the normal distribution with mean 0 and deviation `std`."""

    std: float


Initial = float | Uniform | Normal | Tensor
"""The start of a parameter: a constant, a distribution, or the values themselves."""


@torch.no_grad()
def initialise(module: nn.Module, seed: int, parts: Mapping[str, Part] | None = None) -> None:
    """Initialise every parameter of `module` by its name.

    Linear weights (and patch projections) are Xavier uniform, tokens normal with deviation 0.02, biases 0, scales of
    norms 1 (method 5). Modules with other initial values define `initial_values() -> {parameter: Initial}`. The numbers
    are counter-based, so a model built on the meta device, or in parts, gets the weights of a whole one. `parts` are
    this rank's parts of the parameters; the default is the whole parameters.
    """
    parts = parts or whole_parts(module)
    for owner_name, owner in module.named_modules():
        own: dict[str, Initial] = owner.initial_values() if hasattr(owner, "initial_values") else {}
        for leaf, _ in owner.named_parameters(recurse=False):
            name = f"{owner_name}.{leaf}" if owner_name else leaf
            part = parts[name]
            given = own.get(leaf)
            if given is None:
                given = _by_rule(owner, leaf, part.shape)
            if given is None:
                raise ValueError(f"there is no rule to initialise the parameter {name} of a {type(owner).__name__}")
            _fill(part, given, seed, name)


def _by_rule(owner: nn.Module, leaf: str, shape: torch.Size) -> Initial | None:
    """Return the initial value of a parameter that its module does not choose, or None if there is no rule."""
    if leaf.endswith("bias"):
        return 0.0
    if isinstance(owner, _NORMS):
        return 1.0
    if leaf.endswith("token"):
        return Normal(0.02)
    return Uniform(math.sqrt(6.0 / (shape[0] + shape[1:].numel()))) if leaf == "weight" else None


def _fill(part: Part, given: Initial, seed: int, name: str) -> None:
    """Fill this rank's elements of the parameter `name`."""
    values, start, _ = part
    if isinstance(given, Tensor):
        values.copy_(part.of(given))
    elif isinstance(given, Uniform | Normal):
        u = parameter_uniform(seed, name, start, values.numel(), values.device)
        # The inverse of the normal distribution needs one word per element, whatever the sharding.
        drawn = (2 * u - 1) * given.bound if isinstance(given, Uniform) else normal(u, given.std)
        values.copy_(drawn.view(values.shape))
    else:
        values.fill_(given)
