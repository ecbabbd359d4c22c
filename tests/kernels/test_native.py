"""csrc/: the ids of plain PyTorch bit for bit, on the CPU and from the CUDA kernel, that host threads run
where there is no GPU; and what building does with the compilers at hand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimae.kernels import native, orthogonal_masks, reason, reference, runtime
from mimae.kernels.philox import WORDS_OF_A_STREAM

CHECKOUT = Path(__file__).parents[2]
CSRC = CHECKOUT / "csrc"
ON_CPU = Path(__file__).parent / "cuda_on_cpu"
CPU = torch.device("cpu")
CXX = shutil.which(os.environ.get("CXX", "c++"))
SEED = (5 << 32) + 3
# Small, past 2^40, the largest, negative.
IDS = [0, 3, 2**40 + 5, 2**63 - 1, -7]

built = pytest.mark.skipif(not native.LOADED, reason=str(native.obstacle("orthogonal_masks", CPU)))
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and one.is_contiguous()
        assert torch.equal(one, other)


@needs_compiler
def test_where_there_is_a_compiler_the_extension_serves() -> None:
    assert native.obstacle("orthogonal_masks", CPU) is None
    assert runtime.chosen("orthogonal_masks", torch.arange(2)) == reason("orthogonal_masks", CPU) == "native"


def test_an_extension_that_is_missing_or_broken_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "find_spec", lambda _: None)
    assert native._load() == "mimae._C is not built"
    library = tmp_path / "_C.abi3.so"
    library.write_text("of another machine")
    monkeypatch.setattr(native, "find_spec", lambda _: SimpleNamespace(origin=str(library)))
    assert re.match(r"mimae._C does not load: .*_C.abi3.so: (file too short|invalid ELF header)", str(native._load()))


def test_without_the_extension_auto_draws_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor(IDS)
    expected = orthogonal_masks(SEED, 1, ids, 33, 2, 16)
    monkeypatch.setattr(native, "_missing", "mimae._C is not built")
    assert reason("orthogonal_masks", CPU).startswith("reference: mimae._C is not built; ")
    with pytest.raises(ValueError, match=r"cannot run in native on cpu: mimae\._C is not built"):
        orthogonal_masks(SEED, 1, ids, 33, 2, 16, impl="native")
    assert_same(orthogonal_masks(SEED, 1, ids, 33, 2, 16), expected)


@built
@pytest.mark.parametrize(
    ("shape", "images"),
    [
        ((1, 1, 1), 5),  # one patch, none hidden
        ((2, 1, 1), 5),
        ((13, 3, 4), 5),  # a prime L, and a patch that no view shows
        ((40, 1, 1), 5),  # runs of hidden patches longer than one store
        ((64, 64, 1), 5),  # as many views as patches
        ((196, 4, 49), 400),  # ViT-B/16, more images than a thread's share
        ((197, 8, 24), 400),  # a prime L over a whole number of stores
        ((1025, 3, 341), 20),  # one over a power of two of buckets, two patches in no view
    ],
)
def test_cpu(shape: tuple[int, int, int], images: int, threads: None) -> None:
    ids = torch.tensor(IDS * (images // len(IDS)))
    ids += torch.arange(images) // len(IDS) * 977
    ours = orthogonal_masks(SEED, 77, ids, *shape, impl="native")
    assert_same(ours, reference.orthogonal_masks(SEED, 77, ids, *shape))


@built
@given(st.integers(1, 200), st.data())
def test_any_shape(L: int, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, L))
    N = data.draw(st.integers(1, L // K))
    arguments = (SEED, 5, torch.tensor(IDS), L, N, K)
    assert_same(orthogonal_masks(*arguments, impl="native"), reference.orthogonal_masks(*arguments))


@built
@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63, 2**64 - 1, -1])
def test_seeds_of_64_bits_and_the_last_epoch(seed: int) -> None:
    arguments = (seed, 2**32 - 1, torch.tensor(IDS), 33, 2, 16)
    assert_same(orthogonal_masks(*arguments, impl="native"), reference.orthogonal_masks(*arguments))


@built
def test_equal_words_rank_by_patch() -> None:
    """Two of the first 61 words of this stream are equal. With K = 1 every rank is visible."""
    ids = torch.tensor([1099064])
    assert reference.philox_words(0, 1, 0, ids, 61).unique().numel() == 60
    assert_same(orthogonal_masks(0, 0, ids, 61, 61, 1, impl="native"), reference.orthogonal_masks(0, 0, ids, 61, 61, 1))


@built
def test_ids_may_be_strided_of_32_bits_or_none() -> None:
    for ids in (torch.arange(6, dtype=torch.int32)[::2], torch.arange(0)):
        ours = orthogonal_masks(1, 2, ids, 9, 2, 3, impl="native")
        assert_same(ours, reference.orthogonal_masks(1, 2, ids, 9, 2, 3))


@built
def test_mistakes_are_told() -> None:
    ids = torch.arange(2)
    with pytest.raises(ValueError, match="5 disjoint views of 4 patches need 20 patches, the image has 16"):
        orthogonal_masks(0, 0, ids, 16, 5, 4, impl="native")
    with pytest.raises(ValueError, match="epoch 4294967296"):
        orthogonal_masks(0, 2**32, ids, 16, 2, 4, impl="native")
    with pytest.raises(ValueError, match="a stream has words"):
        orthogonal_masks(0, 0, ids, WORDS_OF_A_STREAM + 1, 2, 4, impl="native")
    with pytest.raises(ValueError, match="club_terms cannot run in native on cpu: it has no such form"):
        runtime.chosen("club_terms", ids, "native")


@built
@pytest.mark.parametrize(
    ("ids", "shape", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), (16, 2, 4), "int64"),
        (torch.zeros(2), (16, 2, 4), "int64"),
        (torch.arange(2), (16, 2**62, 4), "disjoint views"),  # N K overflows
        (torch.arange(2), (16, -1, -4), "disjoint views"),
        (torch.arange(2), (WORDS_OF_A_STREAM + 1, 1, 1), "a stream has words"),
    ],
)
def test_the_op_itself_refuses_what_it_cannot_draw(ids: Tensor, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mimae.orthogonal_masks_native(0, 0, ids, *shape)


@built
def test_the_op_is_registered_as_torch_wants_it() -> None:
    torch.library.opcheck(torch.ops.mimae.orthogonal_masks_native.default, (1, 2, torch.arange(2), 9, 2, 3))


@built
def test_compiles_in_one_graph() -> None:
    draw = torch.compile(orthogonal_masks, fullgraph=True, backend="aot_eager")
    ids = torch.arange(3)
    assert_same(draw(1, 2, ids, 9, 2, 3, impl="native"), reference.orthogonal_masks(1, 2, ids, 9, 2, 3))


# CUDA


def compiled(tmp: Path, *flags: str) -> Path:
    """Compile the CUDA source for host threads."""
    program = tmp / "orthogonal_masks"
    source = ON_CPU / "orthogonal_masks.cpp"
    command = [CXX, "-std=c++20", "-O1", *flags, f"-I{ON_CPU}", f"-I{CSRC}", source, "-o", program, "-pthread"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    return program


@pytest.fixture(scope="module")
def cuda_on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("cuda_on_cpu"))


def run_on_cpu(
    program: Path, seed: int, epoch: int, ids: list[int], L: int, N: int, K: int, shared_bytes: int
) -> tuple[tuple[Tensor, Tensor], str]:
    arguments = [seed, epoch, L, N, K, shared_bytes, *(value % 2**64 for value in ids)]
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    if "FATAL: ThreadSanitizer" in done.stderr:
        pytest.skip(done.stderr.splitlines()[0])
    assert done.returncode in (0, 66), done.stderr  # 66: the sanitizer has found something
    numbers = torch.tensor([int(line) for line in done.stdout.split()], dtype=torch.int32)
    B = len(ids)
    visible, hidden = numbers.split([B * N * K, B * N * (L - K)])
    return (visible.view(B, N, K), hidden.view(B, N, L - K)), done.stderr


@needs_compiler
@pytest.mark.parametrize("shared_bytes", [65536, 0])  # 0: blocks share a workspace, each draws several images
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),  # one patch, one warp
        (13, 3, 4),  # a prime L, and a patch that no view shows
        (32, 32, 1),  # a full warp
        (33, 2, 16),  # one patch of a second warp
        (196, 4, 49),  # ViT-B/16
    ],
)
def test_cuda_kernel_on_host_threads(cuda_on_cpu: Path, shape: tuple[int, int, int], shared_bytes: int) -> None:
    ours, _ = run_on_cpu(cuda_on_cpu, SEED, 77, IDS, *shape, shared_bytes)
    assert_same(ours, reference.orthogonal_masks(SEED, 77, torch.tensor(IDS), *shape))


@needs_compiler
def test_cuda_kernel_ranks_equal_words_by_patch(cuda_on_cpu: Path) -> None:
    ours, _ = run_on_cpu(cuda_on_cpu, 0, 0, [1099064], 61, 61, 1, 65536)
    assert_same(ours, reference.orthogonal_masks(0, 0, torch.tensor([1099064]), 61, 61, 1))


@needs_compiler
@pytest.mark.slow
def test_cuda_kernel_with_more_patches_than_threads(cuda_on_cpu: Path) -> None:
    ours, _ = run_on_cpu(cuda_on_cpu, SEED, 1, IDS[:2], 545, 3, 181, 65536)
    assert_same(ours, reference.orthogonal_masks(SEED, 1, torch.tensor(IDS[:2]), 545, 3, 181))


@needs_compiler
@pytest.mark.slow
def test_cuda_kernel_has_no_race(tmp_path: Path) -> None:
    """The test fails if any __syncthreads() of the kernel is left out."""
    try:
        program = compiled(tmp_path, "-fsanitize=thread", "-g")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no thread sanitizer")
    for shared_bytes in (65536, 0):
        _, said = run_on_cpu(program, SEED, 1, [5, 8, 9, 10, 11, 12], 70, 4, 17, shared_bytes)
        assert "data race" not in said, said


@needs_nvcc
def test_cuda_source_compiles_for_each_gpu(tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in (80, 90, 100)]
    command = ["nvcc", "-std=c++17", "-O3", *targets, "-Xptxas=-v", "-c", str(CSRC / "orthogonal_masks.cu")]
    done = subprocess.run([*command, "-o", str(tmp_path / "object.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"for 'sm_(\d+)'", done.stderr)) == {"80", "90", "100"}
    kernels = 2 * len(targets)
    assert len(re.findall(r"\b0 bytes spill stores, 0 bytes spill loads", done.stderr)) == kernels
    # 2,048 threads of 32 registers fill a processor.
    assert [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)] == [32] * kernels


@pytest.mark.gpu
@pytest.mark.skipif("cuda" not in native.DEVICES, reason="mimae._C is built without CUDA")
@pytest.mark.parametrize(
    ("shape", "images"),
    [
        ((196, 4, 49), 32768),
        ((197, 8, 24), 4096),
        ((1025, 4, 256), 1024),  # more patches than threads
        ((40000, 4, 10000), 300),  # more than shared memory holds
        ((196, 4, 49), 3_700_000),  # lists past 2^31 entries
    ],
)
def test_cuda(shape: tuple[int, int, int], images: int) -> None:
    ids = torch.randint(-(2**62), 2**62, (images,), device="cuda")
    ours = orthogonal_masks(SEED, 77, ids, *shape, impl="native")
    last = orthogonal_masks(SEED, 77, ids[-4096:], *shape, impl="reference")
    assert_same((ours[0][-4096:], ours[1][-4096:]), last)
    again = orthogonal_masks(SEED, 77, ids, *shape, impl="native")
    assert_same(ours, again)


# Building


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "docs", "results", "runs", "tests", "*.egg-info", "*.so")
    return shutil.copytree(CHECKOUT, tmp_path / "tree", symlinks=True, ignore=unwanted)


def build(tree: Path, **environment: str) -> str:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler"])
def test_without_a_working_compiler_one_line_says_so(tree: Path, compiler: str) -> None:
    stale = tree / "mimae" / "_C.abi3.so"
    stale.write_text("of an older source")
    (line,) = build(tree, CXX=compiler, MIMAE_CUDA="0").splitlines()
    assert re.match(rf"mimae: mimae._C was not built \(.*{compiler}.*\): ops are slower", line)
    assert not stale.exists()


@needs_compiler
@needs_nvcc
@pytest.mark.slow
def test_one_file_serves_cpu_and_cuda(tree: Path) -> None:
    assert build(tree, MIMAE_CUDA="1") == ""
    code = (
        "from mimae.kernels import native, orthogonal_masks; import torch; print(native.DEVICES)\n"
        "print(orthogonal_masks(0, 0, torch.arange(2), 16, 4, 4, impl='native')[0].shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["['cpu', 'cuda']", "torch.Size([2, 4, 4])"], done.stderr
