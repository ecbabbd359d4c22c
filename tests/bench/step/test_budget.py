"""Tests of the bytes that a block moves, of the operations of attention, and of the page with the predicted step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mimae.bench.step import command
from mimae.bench.step.budget import IMAGES, STEPS, WAYS, attention_flops, predict, render
from mimae.bench.step.moved import KINDS, SEQUENCES, Way, _Operators, count, counted
from mimae.config.load import load_recipe
from mimae.errors import UserError
from mimae.model.geometry import geometry
from mimae.model.mimae import MIMAE
from mimae.plan.flops import image_flops

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "bench/results"
SMALL = {"width": 32, "heads": 2, "tokens": 5}
TOKENS = SEQUENCES * 5


def bytes_of(work: Any) -> dict[str, int]:
    with _Operators() as operators:
        work()
    return dict(operators.bytes)


def test_an_operator_reads_its_inputs_and_writes_its_results() -> None:
    x = torch.ones(10, 4)
    assert bytes_of(lambda: x * 2) == {"other": 320}
    assert bytes_of(lambda: x.add_(1)) == {"other": 320}
    assert bytes_of(lambda: x + x) == {"other": 480}
    assert bytes_of(lambda: x @ torch.ones(4, 3)) == {"other": 48, "products": 160 + 48 + 120}
    assert bytes_of(lambda: x.view(4, 10).t()[1:].unsqueeze(0).detach()) == {}, "views move nothing"
    assert bytes_of(lambda: x[:, :1].expand(10, 4) * 2) == {"other": 40 + 160}, "what is expanded is read once"
    assert bytes_of(lambda: torch.cat([x, x])) == {"other": 640}, "inputs in a list"


@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_products_and_attention_move_their_operands(residual: str) -> None:
    """In bf16 the products of a forward move 2 (1 + 3), 2 (1 + 1), 2 (1 + 4) and 2 (4 + 1) bytes, and those of its
    backward twice as many. Attention moves 2 (3 + 1), and 2 (5 + 3) in its backward."""
    halves = {part: counted(Way(part, False, residual=residual, **SMALL)) for part in ("attention", "mlp")}  # type: ignore[arg-type]
    whole = counted(Way("block", False, residual=residual, **SMALL))  # type: ignore[arg-type]

    def weights(columns: int, outputs: int) -> float:
        """A weight is read twice, its gradient is written, and biases are read, for all tokens together."""
        return (6 * columns * 32 + 2 * outputs) / TOKENS

    assert halves["attention"]["products"] == pytest.approx(3 * (8 + 4) + weights(4, 4))
    assert halves["mlp"]["products"] == pytest.approx(3 * (10 + 10) + weights(8, 5))
    # Beside them the log-sum-exps of two heads, in fp32, are written and read.
    assert halves["attention"]["attention"] == pytest.approx(8 + 16 + 2 * 4 * 2 / 32)
    assert halves["mlp"]["attention"] == 0
    for kind in KINDS:
        assert whole[kind] == pytest.approx(halves["attention"][kind] + halves["mlp"][kind])


def test_recomputation_moves_more_of_the_other_work_alone() -> None:
    plain, selective = (counted(Way("block", False, how, **SMALL)) for how in ("none", "selective"))  # type: ignore[arg-type]
    assert selective["other"] > plain["other"]
    assert selective["products"] == plain["products"] and selective["attention"] == plain["attention"]


@pytest.mark.slow  # compiles a block twice
def test_a_compiled_block_moves_less() -> None:
    eager, compiled = (count(Way("block", is_compiled, **SMALL)) for is_compiled in (False, True))  # type: ignore[arg-type]
    assert compiled["other"] < 0.8 * eager["other"]
    assert compiled["products"] == eager["products"] and compiled["attention"] == eager["attention"]


def test_a_block_that_cannot_be_counted_is_told(tmp_path: Path) -> None:
    """A checkout whose blocks cannot be imported."""
    folder = tmp_path / "mimae/model"
    folder.mkdir(parents=True)
    for file in (folder.parent / "__init__.py", folder / "__init__.py"):
        file.touch()
    (folder.parent / "errors.py").write_text("class UserError(Exception): pass")
    (folder / "blocks.py").write_text("raise RuntimeError('of another kind')")
    with pytest.raises(UserError, match=r"cannot be counted:(.|\n)*of another kind"):
        count(Way(), tmp_path)


@pytest.mark.parametrize("overrides", [[], ["decoder.predict=next_view"], ["decoder.depth=3", "masking.num_masks=2"]])
def test_operations_of_attention(overrides: list[str]) -> None:
    """torch counts them as batched products where attention is computed in two of them."""
    recipe = load_recipe("quickstart", overrides).recipe
    model, sizes = MIMAE(recipe.data, recipe.masking, recipe.model, recipe.decoder, recipe.objective), geometry(recipe)
    ids = [torch.zeros(1, 1, k, dtype=torch.int32) for k in (sizes.visible, sizes.targets)]
    images = torch.zeros(1, *recipe.data.size_hw, 3, dtype=torch.uint8)
    model.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.decoder(model.encoder(images, ids[0]), *ids)
    found = counter.get_flop_counts()["Global"]
    assert found[torch.ops.aten.bmm] == sum(flops for flops, _ in attention_flops(recipe))


def test_a_step_takes_its_operations_and_bytes_over_the_assumed_rates() -> None:
    """ViT-B/16: 1,024 views of 50 tokens, 197 tokens in the decoder, 147 of them targets."""
    recipe = load_recipe("vit_base_400ep", [f"schedule.batch_size={IMAGES}"]).recipe
    budget = predict(recipe, {"products": 96.0, "attention": 24.0, "other": 100.0}, ops_bytes=1e6)
    memory, peak = 0.8 * 3.35e12, 989e12
    tokens = 1024 * (12 * 50 * 768 + (7 * 197 + 147) * 512)
    encoder, decoder = 4 * 12 * 50**2 * 768, 4 * (7 * 197 + 147) * 197 * 512
    assert budget.other == pytest.approx(1e3 * tokens * 100 / memory)
    assert budget.ops == pytest.approx(1e3 * IMAGES * 1e6 / memory)
    assert budget.optimizer == pytest.approx(1e3 * 30 * 114_562_816 / memory)
    assert budget.attention == pytest.approx(1e3 * 3.5 * 1024 * (encoder / 0.25 + decoder / 0.125) / peak)
    products = 3 * (IMAGES * image_flops(recipe) - 1024 * (encoder + decoder))
    assert budget.products == pytest.approx(1e3 * products / (0.62 * peak))
    assert budget.step == pytest.approx(sum(budget))


def test_files_that_the_page_needs_are_told_before_the_counts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kept-bytes\.json is missing; the page needs kept-bytes\.json and traffic"):
        command.budget(out=tmp_path / "budget.json")
    for name in ("kept-bytes.json", "traffic.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"--against .*other: has no mimae/__init__\.py"):
        command.budget(earlier=tmp_path / "other", out=tmp_path / "budget.json", docs=tmp_path / "budget.md")


def test_the_page_is_rendered_from_the_results() -> None:
    result, kept, traffic = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("budget", "kept-bytes", "traffic")
    )
    page = render(result, kept, traffic)
    assert (ROOT / "docs/budget.md").read_text(encoding="utf-8") == page, "run `mimae bench budget --render`"
    assert len(result["counts"]) == len(WAYS)
    assert all(" ".join(f"`{each}`" for each in overrides) in page for overrides in STEPS)
