"""Tests of the planned FLOPs against the closed formula, the executed model, and the method's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from mimae import distributed
from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe
from mimae.model.geometry import geometry
from mimae.model.masking import views
from mimae.model.mimae import build
from mimae.plan.flops import decoder_flops, encoder_flops, image_flops, objective_flops, step_flops
from mimae.plan.gpus import device_name, peak_flops
from tests.plan import formula

SMALL: dict[str, dict[str, Any]] = {
    "data": {"image_size": [32, 48]},
    "masking": {"num_masks": 3, "ratio": 0.75},
    "model": {"patch_size": 8, "width": 48, "depth": 3, "heads": 4},
    "decoder": {"width": 32, "depth": 2, "heads": 2},
    "schedule": {"batch_size": 5},
    "objective": {"posterior_width": 20},
}
"""A recipe in which no two sizes are equal: 4 x 6 patches, 3 views with 6 visible patches, 5 images."""


def recipe(**sections: Any) -> Recipe:
    """Return the recipe SMALL with the overrides of a test."""
    small = dict(SMALL)
    for name, section in sections.items():
        small[name] = small.get(name, {}) | section
    return load_recipe(small).recipe


def counted(recipe: Recipe, backward: bool = False) -> dict[str, int]:
    """Return the FLOPs by module, as torch counts the matrix products that a batch executes."""
    model = build(recipe)
    B = recipe.schedule.batch_size
    images = torch.randint(0, 256, (B, *recipe.data.size_hw, 3), dtype=torch.uint8)
    visible, targets = views(recipe, 0, 0, torch.arange(B))
    # torch cannot count the CPU's fused attention, so attention runs as two products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(images, visible, targets).loss
        if backward:
            loss.backward()
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


DECODERS = [
    pytest.param({}, id="hidden, self"),
    pytest.param({"predict": "next_view"}, id="next view, self"),
    pytest.param({"attention": "cross"}, id="hidden, cross"),
    pytest.param({"predict": "next_view", "attention": "cross", "depth": 1}, id="next view, cross, one block"),
]


@pytest.mark.parametrize("decoder", DECODERS)
def test_encoder_and_decoder_are_what_torch_counts(decoder: dict[str, Any]) -> None:
    given = recipe(decoder=decoder)
    views = given.schedule.batch_size * given.masking.num_masks
    flops = counted(given)
    assert flops["MIMAE.encoder"] == views * encoder_flops(given)
    assert flops["MIMAE.decoder"] == views * decoder_flops(given)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        pytest.param("vit_base_400ep", ["masking.num_masks=4"], id="ViT-B, four views"),
        pytest.param("vit_base_400ep", ["decoder.predict=next_view"], id="ViT-B, next view"),
        pytest.param("vit_base_400ep", ["decoder.attention=cross", "model.checkpointing=full"], id="ViT-B, cross"),
        pytest.param("quickstart", ["objective.projector=mlp", "schedule.accumulate=2"], id="quickstart, projector"),
        pytest.param("vit_huge14", ["schedule.batch_size=4096", "model.attention=flex"], id="ViT-H, large batch"),
    ],
)
def test_a_step_has_the_flops_of_the_closed_formula(name: str, overrides: list[str]) -> None:
    given = load_recipe(name, overrides).recipe
    assert encoder_flops(given) == formula.encoder_flops(given)
    assert decoder_flops(given) == formula.decoder_flops(given)
    assert step_flops(given) == formula.step_flops(given)


def test_a_count_asks_no_other_rank() -> None:
    """In a run, the main rank counts alone. Two ranks would split the images, and multiply each pair of views twice."""
    given = recipe(schedule={"batch_size": 6})
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        assert objective_flops(given) == formula.objective_flops(given)
        assert distributed.world_size() == 2
    finally:
        dist.destroy_process_group()


def test_v_and_projector_are_what_torch_counts() -> None:
    without_contrast = recipe(objective={"max_mi": 0, "min_mi": 1})
    images = without_contrast.schedule.batch_size
    assert counted(without_contrast)["MIMAE.objective"] == images * objective_flops(without_contrast)
    # The reference path of InfoNCE runs every product twice, so the projector's share is found by a difference.
    plain, projected = (recipe(objective={"projector": kind, "min_mi": 0}) for kind in ("none", "mlp"))
    more = counted(projected)["MIMAE"] - counted(plain)["MIMAE"]
    assert more == images * (objective_flops(projected) - objective_flops(plain)) > 0


def test_infonce_is_over_the_micro_batch() -> None:
    # 3 pairs of views, 2 FLOPs, 5 columns, width 48; V is off.
    assert objective_flops(recipe(objective={"min_mi": 0})) == 3 * 2 * 5 * 48
    halves = recipe(objective={"min_mi": 0}, schedule={"batch_size": 10, "accumulate": 2})
    assert objective_flops(halves) == 3 * 2 * 5 * 48
    assert objective_flops(recipe(objective={"max_mi": 0, "min_mi": 0})) == 0


@pytest.mark.parametrize("decoder", [{}, {"predict": "next_view", "attention": "cross"}], ids=["default", "cross"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_step_is_three_forwards_but_for_the_gradient_of_pixels(checkpointing: str, decoder: dict[str, Any]) -> None:
    no_mi = {"max_mi": 0, "min_mi": 0}
    given = recipe(objective=no_mi, model={"checkpointing": checkpointing}, decoder=decoder)
    executed = counted(given, backward=True)["Global"]
    views, K = given.schedule.batch_size * given.masking.num_masks, 6
    pixels = views * 2 * K * 3 * 8**2 * 48
    if checkpointing == "full":
        assert executed > step_flops(given)  # the recomputation that the cost model leaves out
    elif checkpointing == "selective":
        # Attention runs as two products here, which are recomputed; a fused form is not.
        assert step_flops(given) - pixels < executed < 1.03 * step_flops(given)
    else:
        assert executed == step_flops(given) - pixels


def test_vit_base_has_the_numbers_of_the_method() -> None:
    given = load_recipe({"model": {"size": "base"}, "schedule": {"batch_size": 4096}}).recipe
    giga = 1e9
    assert encoder_flops(given) / giga == pytest.approx(8.6, abs=0.05)
    # The method counts 10.6 with a whole last block; here the products of the 50 unused tokens are left out.
    unread = 50 * (20 * 512**2 + 4 * 197 * 512)
    assert (decoder_flops(given) + unread) / giga == pytest.approx(10.6, abs=0.15)
    assert image_flops(given) / giga == pytest.approx(77, abs=1)
    training = step_flops(given) / 4096
    assert training == pytest.approx(0.23e12, rel=0.02)
    assert 0.45 * 989e12 / training == pytest.approx(1940, rel=0.01)  # 1,900 with a whole last block


def test_what_the_decoder_leaves_out_at_vit_base() -> None:
    """The savings are those of the last block's unused tokens, and those of next_view and cross."""

    def flops(**decoder: str) -> float:
        return image_flops(load_recipe({"decoder": decoder}).recipe)

    unread = 4 * 50 * (20 * 512**2 + 4 * 197 * 512)
    assert unread / (flops() + unread) == pytest.approx(0.0146, abs=5e-5)
    assert flops(predict="next_view") / flops() == pytest.approx(0.713, abs=5e-4)
    assert flops(attention="cross") / flops() == pytest.approx(0.813, abs=5e-4)
    assert flops(predict="next_view", attention="cross") / flops() == pytest.approx(0.589, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("Tesla V100-SXM2-32GB", None, 15.7),  # no bf16 units: any share of their peak would be invented
        ("Tesla V100-PCIE-16GB", None, 14),
        ("NVIDIA A10G", None, None),  # not an A10
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("CPU", None, None),
    ],
)
def test_peaks_are_found_by_the_name_that_torch_gives(name: str, bf16: float | None, fp32: float | None) -> None:
    assert peak_flops(name, "bf16") == (None if bf16 is None else bf16 * 1e12)
    assert peak_flops(name, "fp32") == (None if fp32 is None else fp32 * 1e12)


def test_tf32_has_its_own_peak() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 156e12
        assert peak_flops("Tesla V100-SXM2-32GB", "fp32") == 15.7e12  # has none
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_cpu_has_a_name() -> None:
    assert device_name(torch.device("cpu")) == "CPU"


@pytest.mark.parametrize(("rounding", "shown"), [("nearest", 5), ("down", 4)])
def test_the_plan_counts_the_patches_that_masks_show(rounding: str, shown: int) -> None:
    """A fifth of 24 patches is 4.8, which is rounded."""
    rounded = recipe(masking={"ratio": 0.8, "rounding": rounding})
    visible, _ = views(rounded, 0, 0, torch.arange(2))
    assert geometry(rounded).visible == visible.shape[2] == shown
    assert counted(rounded)["MIMAE.encoder"] == 5 * 3 * encoder_flops(rounded)
