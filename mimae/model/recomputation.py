"""Activation checkpointing: a block keeps all activations, its products and attention, or only its input."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mimae.model.settings import Checkpointing

BUDGET = 0.7
"""Share of the activations of a compiled block that torch's partitioner keeps with `selective`. Products and attention
take about this share; with 0.6 attention would be recomputed too."""

_ops = torch.ops.aten

_PRODUCTS = {_ops.addmm.default, _ops.mm.default}

_ATTENTION = {
    _ops._scaled_dot_product_flash_attention_for_cpu.default,
    _ops._scaled_dot_product_flash_attention.default,
    _ops._scaled_dot_product_efficient_attention.default,
    _ops._scaled_dot_product_cudnn_attention.default,
}


def _policy(context: Any, op: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """Return whether the result of an operator is kept.

    The result of the MLP's second product is not kept: it is the last operator of a block, so no recomputation needs
    it. The policy recognises it as the product with more inputs than outputs.
    """
    if op in _PRODUCTS:
        *_, weight = inputs
        return CheckpointPolicy.PREFER_RECOMPUTE if weight.shape[0] > weight.shape[1] else CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


_SELECTIVE = partial(create_selective_checkpoint_contexts, _policy)


def call(block: nn.Module, how: Checkpointing, *inputs: Tensor | None) -> Tensor:
    """Return block(*inputs). In training, `how` chooses the activations that are kept; backward recomputes the others.

    With `selective` a compiled block is called directly, because its graph was already partitioned by `BUDGET`.
    """
    is_compiled = block._compiled_call_impl is not None
    if how == "none" or not block.training or (how == "selective" and is_compiled):
        return block(*inputs)
    if how == "selective":
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=_SELECTIVE)
    return checkpoint(block, *inputs, use_reentrant=False)
