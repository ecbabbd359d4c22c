"""Tests that offline compilation reads the known properties of kernels from their machine code."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from mimae.bench.ops import traffic
from mimae.bench.ops.cases import CASES, chosen
from mimae.bench.ops.cases.case import Size
from mimae.bench.ops.offline import PROCESSORS, TARGETS, Binary, compiled, fresh_processes, machine_code
from mimae.kernels import runtime
from mimae.kernels.runtime import Launch, Target
from tests.bench.ops import toy_kernels

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    with fresh_processes(1, interpret=False) as pool:
        yield pool


def test_alignment_decides_the_width_of_accesses(compiler: ProcessPoolExecutor) -> None:
    aligned, odd = (compiler.submit(toy_kernels.compile_copy, start, 90).result() for start in (0, 1))
    assert aligned.accesses == {16: 2} and aligned.wide_share == 1
    assert set(odd.accesses) == {2, 16} and odd.wide_share == 0.5, "loads of an element, stores of eight"
    assert aligned.local_bytes == odd.local_bytes == 0 and aligned.matrix == {}


@pytest.mark.parametrize(("capability", "kind"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_matrix_instructions_of_each_architecture(compiler: ProcessPoolExecutor, capability: int, kind: str) -> None:
    binary = compiler.submit(toy_kernels.compile_product, 128, 8, capability).result()
    assert list(binary.matrix) == [kind]
    assert binary.local_bytes == 0 and binary.fits
    assert binary.shared_bytes >= 2 * 128 * 64 * 2, "a step of both operands"
    assert binary.wide_share > 0.9


def test_spills_are_seen(compiler: ProcessPoolExecutor) -> None:
    """Compile a 256 x 256 tile for four warps: 512 sums per thread, but 255 registers."""
    binary = compiler.submit(toy_kernels.compile_product, 256, 4, 90).result()
    assert binary.registers == 255 and binary.local_bytes > 1000
    row = {**binary.row(), "op": "club", "size": "none"}
    assert [line for line in traffic.flaws(row) if "spilled" in line]


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, 16),  # 2,048 threads
        ({"registers": 33}, 12),  # allocated as 40 per thread
        ({"registers": 128, "warps": 8}, 2),
        ({"shared_bytes": 75 << 10}, 3),  # plus 1 KiB of the system per block: 76 of 228 KiB
        ({"shared_bytes": 76 << 10}, 2),
        ({"warps": 1}, 32),  # the maximum number of blocks
        ({"capability": 100, "tensor_columns": 256}, 2),  # of 512
        ({"capability": 89}, 12),  # 1,536 threads
        ({"capability": 86, "warps": 1}, 16),
        ({"capability": 86, "shared_bytes": 33 << 10}, 2),  # of 100 KiB
    ],
)
def test_blocks_of_a_multiprocessor(change: dict[str, int], blocks: int) -> None:
    plain = Binary("copy", 90, 4, 32, 0, 0, 0, {}, {})
    binary = plain._replace(**change)  # type: ignore[arg-type]
    assert binary.blocks == blocks
    assert binary.occupancy == blocks * binary.warps / PROCESSORS[binary.capability].warps


def test_a_block_may_not_ask_for_more_than_there_is() -> None:
    limit = PROCESSORS[90].shared_of_block
    binary = Binary("copy", 90, 4, 32, 0, limit, 0, {}, {})
    assert binary.fits and binary.blocks == 1
    row = {**binary._replace(shared_bytes=limit + 1).row(), "op": "club", "size": "none"}
    assert [line for line in traffic.flaws(row) if "do not fit" in line]


@pytest.mark.parametrize(("op", "flawed"), [("infonce", True), ("club", False)])
def test_hopper_instructions_are_demanded(op: str, flawed: bool) -> None:
    row = {**Binary("k", 90, 8, 128, 0, 0, 0, {"HMMA": 2}, {}).row(), "op": op, "size": "none"}
    assert bool(traffic.flaws(row)) == flawed
    assert not traffic.flaws({**row, "capability": 80})
    assert not traffic.flaws({**row, "matrix": {"HGMMA": 2}})


@pytest.mark.skipif(not runtime.INTERPRETED, reason="triton compiles in this process")
def test_an_interpreting_process_is_told_so() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compiled(Launch(toy_kernels.copy, (1,), {}, {}), 90)


def assert_sound(binaries: list[dict]) -> None:
    assert [flaw for binary in binaries for flaw in traffic.flaws(binary)] == []
    of_hopper = [each for each in binaries if each["capability"] == 90 and traffic.bound_of(each["op"]).hopper]
    for op in {each["op"] for each in of_hopper}:
        assert {"HGMMA"} in [set(each["matrix"]) for each in of_hopper if each["op"] == op], op


def test_machine_code_of_an_op() -> None:
    binaries = machine_code(chosen(["view_latents"])[:1], processes=1)
    assert {each["capability"] for each in binaries} == {80, 90, 100}
    assert {each["kernel"] for each in binaries} == {"_pool", "_merge", "_spread"}
    assert_sound(binaries)


WORKSTATIONS = (Target(86, 84), Target(89, 142))
"""Targets RTX A6000 and RTX 6000 Ada, whose blocks have 99 KiB of shared memory."""


@pytest.mark.slow
@pytest.mark.parametrize("targets", [TARGETS, WORKSTATIONS], ids=["servers", "workstations"])
def test_machine_code_of_all_ops(targets: tuple[Target, ...]) -> None:
    assert_sound(machine_code(CASES, targets=targets))


@pytest.mark.slow
@pytest.mark.parametrize("target", [*TARGETS, WORKSTATIONS[0]], ids=lambda target: f"sm_{target.capability}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(256, 768), (128, 1024)], ids=["ViT-B on 16 GPUs", "ViT-L on 32"])
def test_machine_code_of_infonce_of_a_rank(
    compiler: ProcessPoolExecutor, rows: int, width: int, dtype: torch.dtype, target: Target
) -> None:
    binaries = compiler.submit(toy_kernels.compile_infonce_of_a_rank, rows, width, dtype, target).result()
    assert_sound([{**each.row(), "op": "infonce", "size": "of a rank"} for each in binaries])


HUGE = Size("ViT-H/14", 1280, 1024, patch=14)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [TARGETS, WORKSTATIONS], ids=["servers", "workstations"])
@pytest.mark.parametrize(
    "size", [HUGE, HUGE._replace(name="fp32", precision=torch.float32)], ids=lambda size: size.name
)
def test_machine_code_at_other_sizes(size: Size, targets: tuple[Target, ...]) -> None:
    assert_sound(machine_code([case._replace(sizes=(size,)) for case in CASES], targets=targets))
