"""Tests of the activations that a block keeps for backward: their bytes, and the operators that are recomputed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mimae.model.blocks import Block
from mimae.model.recomputation import BUDGET, call
from mimae.model.settings import Checkpointing

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
WIDTH, HEADS, TOKENS, SEQUENCES = 96, 3, 50, 32


class Counting(TorchDispatchMode):
    """A counter of the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("backend", "how", "again"),
    [
        ("sdpa", "none", {}),
        # Products and attention are not recomputed; norms and GELU are, once each.
        ("sdpa", "selective", {"native_layer_norm": 2, "gelu": 1}),
        # Nothing needs the result of the MLP's second product.
        ("sdpa", "full", {"addmm": 3, "native_layer_norm": 2, "gelu": 1, ATTENTION: 1}),
        # Plain attention is not a single operator, so its two products are recomputed.
        ("plain", "selective", {"native_layer_norm": 2, "gelu": 1, "baddbmm": 1, "_softmax": 1, "bmm": 1}),
    ],
)
def test_what_is_computed_again(backend: str, how: Checkpointing, again: dict[str, int]) -> None:
    block = Block(WIDTH, HEADS, backend)
    out = call(block, how, torch.randn(2, TOKENS, WIDTH, requires_grad=True), None)
    with Counting() as counted:
        out.sum().backward()
    if backend == "plain":  # Its backward has bmm operators too.
        counted.ran["bmm"] -= 4
    names = ("addmm", "native_layer_norm", "gelu", "baddbmm", "_softmax", "bmm", ATTENTION)
    assert {name: counted.ran[name] for name in names if counted.ran[name]} == again


@pytest.mark.slow  # compiles a block twice
def test_a_compiled_block_keeps_its_products_and_recomputes_the_rest() -> None:
    """In bf16 a block keeps at most 24 bytes per token and channel; without recomputation it keeps 34 or more.

    The bf16 copies of weights are left out, because they do not depend on tokens.
    """
    before = functorch.activation_memory_budget
    kept = {}
    try:
        ways: tuple[tuple[Checkpointing, float], ...] = (("none", 1.0), ("selective", BUDGET))
        for how, budget in ways:
            torch.compiler.reset()
            functorch.activation_memory_budget = budget
            kept[how] = _kept_by_compiled(how)
    finally:
        functorch.activation_memory_budget = before
    assert kept["selective"] <= 24 < 33 < kept["none"]


def _kept_by_compiled(how: Checkpointing) -> float:
    block = Block(WIDTH, HEADS, "sdpa")
    block.compile(dynamic=False)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.shape[0] in (SEQUENCES, SEQUENCES * TOKENS):
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randn(SEQUENCES, TOKENS, WIDTH, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        out = call(block, how, tokens, None)
    kept.pop(out.untyped_storage().data_ptr(), None)
    out.sum().backward()
    return sum(kept.values()) / tokens.numel()
