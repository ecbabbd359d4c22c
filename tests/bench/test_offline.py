"""Offline compilation sees in machine code what the kernels were written to show."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from mimae.bench import traffic
from mimae.bench.cases import CASES, Size, chosen
from mimae.bench.offline import PROCESSORS, Binary, compiled, fresh_processes, machine_code
from mimae.kernels import runtime
from mimae.kernels.runtime import Launch
from tests.bench import toy_kernels

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
    """A tile of 256 x 256 in four warps: 512 sums a thread, of 255 registers."""
    binary = compiler.submit(toy_kernels.compile_product, 256, 4, 90).result()
    assert binary.registers == 255 and binary.local_bytes > 1000
    row = {**binary.row(), "op": "club", "size": "none"}
    assert [line for line in traffic.flaws(row) if "spilled" in line]


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, 16),  # 2,048 threads
        ({"registers": 33}, 12),  # given out as 40 to a thread
        ({"registers": 128, "warps": 8}, 2),
        ({"shared_bytes": 75 << 10}, 3),  # each with 1 KiB of the system's: 76 KiB, of 228
        ({"shared_bytes": 76 << 10}, 2),
        ({"warps": 1}, 32),  # the most blocks
        ({"capability": 100, "tensor_columns": 256}, 2),  # of 512
    ],
)
def test_blocks_of_a_multiprocessor(change: dict[str, int], blocks: int) -> None:
    plain = Binary("copy", 90, 4, 32, 0, 0, 0, {}, {})
    binary = plain._replace(**change)  # type: ignore[arg-type]
    assert binary.blocks == blocks
    assert binary.occupancy == blocks * binary.warps / 64


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
    for op in {binary["op"] for binary in binaries if traffic.BOUNDS[binary["op"]].hopper}:
        kinds = [set(each["matrix"]) for each in binaries if each["op"] == op and each["capability"] == 90]
        assert {"HGMMA"} in kinds, op


def test_machine_code_of_an_op() -> None:
    binaries = machine_code(chosen(["view_latents"])[:1], processes=1)
    assert {each["capability"] for each in binaries} == {80, 90, 100}
    assert {each["kernel"] for each in binaries} == {"_pool", "_merge", "_spread"}
    assert_sound(binaries)


@pytest.mark.slow
def test_machine_code_of_all_ops() -> None:
    assert_sound(machine_code(CASES))


HUGE = Size("ViT-H/14", 1280, 1024, patch=14)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [HUGE, HUGE._replace(name="fp32", precision=torch.float32)], ids=lambda size: size.name
)
def test_machine_code_at_other_sizes(size: Size) -> None:
    assert_sound(machine_code([case._replace(sizes=(size,)) for case in CASES]))
