"""Tests of the activations that a block keeps for backward: their bytes, and the operators that are recomputed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch import config as functorch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mimae.config.load import load_recipe
from mimae.config.recipe import RunRecipe
from mimae.engines.compiling import compile_units
from mimae.engines.make import ENGINES, setup_of
from mimae.model.blocks import Block
from mimae.model.masking import views
from mimae.model.mimae import build
from mimae.model.recomputation import BUDGET, call
from mimae.model.settings import Checkpointing

ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
WIDTH, HEADS, TOKENS, SEQUENCES = 96, 3, 50, 32
SMALL = {
    "precision": "fp32",
    "data": {"image_size": 32},
    "model": {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "attention": "sdpa"},
    "decoder": {"width": 32, "depth": 2, "heads": 2},
    "schedule": {"batch_size": 2},
}


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


@pytest.mark.parametrize("recipe", ["quickstart", "finetune_cifar10", "segment_small", "detect_coco_vit_base"])
@pytest.mark.parametrize(
    ("kind", "how", "compiled", "refused"),
    [
        ("ddp", "full", "graphs", "compile=on"),
        ("ddp", "selective", "on", ""),
        ("zero3", "selective", "off", "model.checkpointing=full works"),
        ("zero3", "full", "off", ""),
        ("zero2", "selective", "off", ""),
        ("fsdp", "selective", "off", ""),
    ],
)
def test_every_task_refuses_what_cannot_be_recomputed(
    recipe: str, kind: str, how: Checkpointing, compiled: str, refused: str
) -> None:
    overrides = [f"engine.kind={kind}", f"model.checkpointing={how}", f"compile={compiled}"]
    setup = setup_of(load_recipe(recipe, overrides, None, RunRecipe).recipe)
    reason = ENGINES[kind].obstacles(setup, torch.device("cpu"))[f"model.checkpointing={how}"]
    assert (reason is None) == (refused == "") and refused in (reason or "")


def test_models_of_one_process_keep_what_each_of_them_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile equal blocks, first without recomputation: the second model must not run the code of the first.

    The front half of the compiler decides what is kept, so that its back half is left out here.
    """

    def front_half(graph: Any, inputs: Any, **options: Any) -> Any:
        return lookup_backend("aot_eager_decomp_partition")(graph, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", front_half)
    kept: dict[str, list[int]] = {}
    ways: tuple[Checkpointing, ...] = ("none", "selective", "none")
    with dynamo.patch(recompile_limit=1):  # The models have to make room for their code.
        for how in ways:
            kept.setdefault(how, []).append(_kept_by_model(how))
    assert kept["none"][0] == kept["none"][1] > 1.15 * kept["selective"][0]


def _kept_by_model(how: Checkpointing) -> int:
    """Return how many numbers a small model with compiled blocks keeps for its backward."""
    recipe = load_recipe(SMALL, [f"model.checkpointing={how}"]).recipe
    model = build(recipe).train()
    compile_units(model, "on", recipe.model.checkpointing, torch.device("cpu"))
    numbers: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        numbers.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), *views(recipe, 0, 0, torch.arange(2))).loss.backward()
    return sum(numbers)


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
