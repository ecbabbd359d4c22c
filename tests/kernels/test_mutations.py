"""The kernels' tests bite: a kernel that is broken in one place makes the check of its own test file fail.

A mutant is a copy of a module with one text replaced, whose launchers and kernels stand in for the module's while one
of the checks of its test file runs. Each mutation stays within the memory of its arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from mimae.kernels.runtime import INTERPRETED

KernelInterface = pytest.importorskip("triton.runtime.jit").KernelInterface

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="a mutant may do anything to a GPU"),
    # Of what mutants compute, and infonce's lanes past the edge.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

Check = Callable[[Any, pytest.MonkeyPatch], None]
"""Runs a check of a test module."""


class Subject(NamedTuple):
    """A module of kernels and the checks of its test file that have to see its mutations."""

    module: str
    checks: dict[str, Check]
    mutations: list[tuple[str, str, str, str]]
    """What is lost, by which check it shows, the text, and what stands there instead."""


def _infonce(size: str) -> Check:
    def check(test: Any, patch: pytest.MonkeyPatch) -> None:
        test.use_tiles(patch, 64, 32)
        test.test_one_rank_against_float64(test.ONE_RANK[size])

    return check


def _infonce_of_near_views(tau: float) -> Check:
    def check(test: Any, patch: pytest.MonkeyPatch) -> None:
        test.use_tiles(patch, 64, 32)
        test.test_views_that_nearly_agree(tau)

    return check


def _infonce_of_a_rank(test: Any, patch: pytest.MonkeyPatch) -> None:
    test.use_tiles(patch, 64, 32)
    test.test_rows_of_a_rank_against_float64((37, 3, 9, slice(11, 16)))


SUBJECTS = [
    Subject(
        "orthogonal_masks",
        {"named": lambda test, patch: test.test_named_shapes((13, 3, 4))},
        [
            (
                "words in their order",
                "named",
                "tl.join(first, third), tl.join(second",
                "tl.join(first, second), tl.join(third",
            ),
            ("the upper half of an id", "named", "(sample >> 32).to(tl.uint32)", "(sample >> 63).to(tl.uint32)"),
            (
                "the view of a rank",
                "named",
                "for view in range(views):\n        sequence = image * views + view",
                "for view in range(views):\n        sequence = image * views + views - 1 - view",
            ),
            (
                "the last hidden patch",
                "named",
                "is_hidden = (patch < patches) &",
                "is_hidden = (patch < patches - 1) &",
            ),
            ("the stride of hidden lists", "named", "sequence * (patches - shown)", "sequence * shown"),
            (
                "words past the image's end come last",
                "named",
                "tl.where(patch < patches, word.to(tl.uint64), 0xFFFFFFFF)",
                "word.to(tl.uint64)",
            ),
        ],
    ),
    Subject(
        "embed_visible",
        {
            "usual": lambda test, patch: test.test_sizes(test.USUAL),
            "steps": lambda test, patch: test.test_sizes(test.Shape(2, 2, 3, 32, 48, 16, 12)),
        },
        [
            (
                "the first step of the product",
                "steps",
                "range(0, PIECES * PADDED, STEP)",
                "range(STEP, PIECES * PADDED, STEP)",
            ),
            (
                "the line of a pixel",
                "usual",
                "feature // (3 * PATCH) * (3 * WIDTH)",
                "feature // (3 * PATCH) * (3 * PATCH)",
            ),
            (
                "the image of a view",
                "usual",
                "origin = _origin(sequence // VIEWS, patch, PATCH, HEIGHT, WIDTH)\n\n",
                "origin = _origin(sequence * 0, patch, PATCH, HEIGHT, WIDTH)\n\n",
            ),
            ("the class token", "usual", "tl.where(is_patch[:, None], of_patch, of_class)", "of_patch"),
            ("a patch's own position", "usual", "pos + (1 + patch)[:, None]", "pos + (0 * patch)[:, None]"),
            (
                "the least piece of fp32",
                "usual",
                "tl.where(piece == 1, rest, least)",
                "tl.where(piece == 1, rest, 0.0)",
            ),
            (
                "rows without pixels in backward",
                "usual",
                "gradient = tl.where(is_patch[:, None], gradient.to(tl.float32), 0.0)",
                "gradient = gradient.to(tl.float32)",
            ),
            ("the last part of backward", "usual", "for part in range(parts):", "for part in range(parts - 1):"),
            ("the channel's mean in backward", "usual", "(total + _offset(mean, channel) * bias_total)", "total"),
        ],
    ),
    Subject(
        "places",
        {"lists": lambda test, patch: test.test_places_invert_a_list()},
        [
            (
                "patches that are not listed",
                "lists",
                "tl.full((BLOCK,), -1, tl.int32)",
                "tl.full((BLOCK,), 0, tl.int32)",
            ),
            ("the stride of a view's list", "lists", "ids += view * listed", "ids += view * 0"),
        ],
    ),
    Subject(
        "fill_masked",
        {
            "usual": lambda test, patch: test.test_sizes(test.USUAL),
            "shares": lambda test, patch: test.test_sizes(test.Shape(11, 3, 4, 2, 2, 8)),
        },
        [
            ("a position", "usual", "token + positions, mask=held", "token, mask=held"),
            ("the mask token", "usual", "target = positions + tl.load(", "target = positions + 0 * tl.load("),
            (
                "the stride of a view's rows",
                "usual",
                "row = view * (1 + shown + targets) + 1 + shown + target_place",
                "row = view * (1 + shown) + 1 + shown + target_place",
            ),
            (
                "views past a program's first",
                "shares",
                "tl.program_id(1).to(tl.int64) * VIEWS",
                "tl.program_id(1).to(tl.int64) * 0",
            ),
            ("which rows are tokens, for the sum", "usual", "tl.where(is_token[:, None], 0.0, gradient)", "gradient"),
            (
                "the last tile of a share's rows",
                "usual",
                "tl.minimum(first + SHARE, count), ROWS",
                "tl.minimum(first + SHARE, count) - ROWS, ROWS",
            ),
            ("the gradient of a view's first token", "usual", "(place < shown)", "(place < shown) & (place > 0)"),
        ],
    ),
    Subject(
        "pixel_loss",
        {
            "usual": lambda test, patch: test.test_sizes(test.USUAL, True),
            "shares": lambda test, patch: test.test_sizes(test.Shape(1, 2, 3, 3, 9, 1), False),
            "weight": lambda test, patch: test.test_a_mean_and_a_weight(test.torch.float32),
        },
        [
            ("the unbiased variance", "usual", "/ (SIZE - 1)", "/ SIZE"),
            (
                "the mask of a variance",
                "usual",
                "tl.where(inside, target - tl.sum(target, 0) / SIZE, 0)",
                "target - tl.sum(target, 0) / SIZE",
            ),
            (
                "the last patch of a share",
                "shares",
                "for patch in range(first, last):",
                "for patch in range(first, last - 1):",
            ),
            ("the last view", "usual", "for view in range(views):", "for view in range(views - 1):"),
            (
                "the channel of a value",
                "usual",
                "tl.where(channel == 1, green, blue)",
                "tl.where(channel == 1, blue, green)",
            ),
            ("the line pitch", "usual", "line * pitch + byte", "line * (3 * PATCH) + byte"),
            ("the weight that backward learns of", "weight", "value * factor, mask", "value, mask"),
        ],
    ),
    Subject(
        "view_latents",
        {
            "packed": lambda test, patch: test.test_packed_by_view((5, 3, 6, 7), 1),
            "in image order": lambda test, patch: test.test_in_image_order((2, 5, 11, 7), 0),
            "far from zero": lambda test, patch: test.test_deviations_of_latents_far_from_zero(),
            "tiles of pairs": lambda test, patch: test.test_more_pairs_than_a_tile_of_them(),
        },
        [
            (
                "the last tile of tokens",
                "packed",
                "for t in range(first, T, ROWS):",
                "for t in range(first, T - ROWS, ROWS):",
            ),
            (
                "the mask of tokens",
                "in image order",
                "mask=pooled[:, None] & inside[None, :], other=0",
                "mask=inside[None, :], other=0",
            ),
            ("the stride of a view", "packed", "(number % N).to(tl.int64) * by_view", "(number % N).to(tl.int64) * 0"),
            ("how many are pooled", "packed", "latent = total / (T - first)", "latent = total / T"),
            ("ids of a view", "in image order", "visible + view * T + place", "visible + view // N * N * T + place"),
            (
                "deviations between programs",
                "far from zero",
                "squares += tl.sum(within + between, 0)",
                "squares += tl.sum(within, 0)",
            ),
            (
                "programs past the first in the moments",
                "tiles of pairs",
                "range(0, programs, ROWS)",
                "range(0, 1, ROWS)",
            ),
            ("the part of d_u along u", "packed", "(of_u - u * radial) / length", "of_u / length"),
            (
                "zeros before the first token",
                "packed",
                "tl.where((place >= first)[:, None], share[None, :], 0)",
                "share[None, :]",
            ),
            (
                "a view that shows the token too",
                "in image order",
                "tl.sum(times[:, :, None] * share[None, :, :], 1)",
                "tl.max(times[:, :, None] * share[None, :, :], 1)",
            ),
        ],
    ),
    Subject(
        "infonce",
        {
            "prime": _infonce("prime, one over a step of D"),
            "panels": _infonce("one over a tile of rows and two of columns: two panels, the second of one row"),
            "a rank's": _infonce_of_a_rank,
            "own maxima": _infonce_of_near_views(0.0156),
            "shared exponential": _infonce_of_near_views(0.0281),
        },
        [
            (
                "the last step of the product",
                "prime",
                "for first in range(0, D, DEPTH):",
                "for first in range(0, D - DEPTH, DEPTH):",
            ),
            (
                "the mask of D",
                "prime",
                "(j < rights)[None, :] & (k < D - first)[:, None]",
                "(j < rights)[None, :] & (k < D)[:, None]",
            ),
            (
                "the mask of columns in a denominator",
                "prime",
                "there = (rows < b)[:, None] & (columns < B)[None, :]",
                "there = (rows < b)[:, None] & (columns < 64)[None, :]",
            ),
            (
                "the sibling of a denominator",
                "prime",
                "right = _latents(u, start, other, N, D)\n        tile",
                "right = _latents(u, start, view, N, D)\n        tile",
            ),
            (
                "the last part of a row's sum",
                "panels",
                "for first in range(0, parts, PARTS):\n            part = first + tl.arange(0, PARTS)",
                "for first in range(0, parts, PARTS):\n            part = first + 1 + tl.arange(0, PARTS)",
            ),
            ("the positive in the gradient", "prime", "weights - 32768", "weights"),
            (
                "the weights as columns",
                "prime",
                "(from_rows[:, None] + from_columns[None, :])",
                "(from_rows[:, None] + 0 * from_columns[None, :])",
            ),
            (
                "the sibling of a gradient",
                "a rank's",
                "right = _latents(u, begin, other, N, D)",
                "right = _latents(u, begin, view, N, D)",
            ),
            (
                "the second panel",
                "panels",
                "for start in range(0, b, height):",
                "for start in range(0, min(b, height), height):",
            ),
            (
                "half of d_tau, which rows and columns share",
                "a rank's",
                "        share *= 0.5\n",
                "        share *= 1.0\n",
            ),
            (
                "1/tau as forward rounds it",
                "own maxima",
                "scores = products * inverse\n            weights",
                "scores = products / tl.load(tau)\n            weights",
            ),
            (
                "log2 e as forward has it",
                "shared exponential",
                "shares = tl.exp2(products * slope - slope + 14)",
                "shares = tl.exp2(products * (1.442694 * inverse) - slope + 14)",
            ),
        ],
    ),
    Subject(
        "club",
        {
            "sizes": lambda test, patch: test.test_against_float64((33, 3, 131)),
            "eight views": lambda test, patch: test.test_against_float64((1, 8, 5)),
            "nothing": lambda test, patch: test.test_latents_that_carry_nothing(),
        },
        [
            ("the mask of 1/s2", "eight views", "tl.where(held, tl.exp(-log), 0)", "tl.exp(-log)"),
            (
                "the last images of a share",
                "sizes",
                'IMAGES: tl.constexpr, DIMENSIONS: tl.constexpr,\n):  # fmt: skip\n    """The sums',
                'IMAGES: tl.constexpr, DIMENSIONS: tl.constexpr,\n):  # fmt: skip\n    B -= 1\n    """The sums',
            ),
            ("the spread of y", "nothing", "club += (N * spread + gain) * inverse", "club += (N + gain) * inverse"),
            (
                "the number of views",
                "eight views",
                "nll += N * log + square * inverse",
                "nll += log + square * inverse",
            ),
            (
                "programs past the first",
                "sizes",
                "for start in range(0, groups, ROWS):",
                "for start in range(0, 0 * groups, ROWS):",
            ),
            ("the pull through the variance", "sizes", "(pull * y - push)", "(0 * pull * y - push)"),
            ("the pull through the mean", "sizes", "(pull * y - push)", "(pull * y)"),
            ("the last view", "eight views", "            errors += error\n", "            errors = error\n"),
            (
                "the stride of views",
                "sizes",
                "at = (image * N + n) * D + d[None, :]",
                "at = (image * N + 0 * n) * D + d[None, :]",
            ),
        ],
    ),
]

TEST_FILES = {"places": "test_fill_masked"}
_numbers = count()


def copy_of(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A copy with a text that occurs once replaced; its ops are registered under a name of their own."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    if source.count(old) != 1:
        raise LookupError(f"{module.__name__} has {source.count(old)} times {old!r}: mend the mutation")
    name = f"mutant{next(_numbers)}"
    file = folder / f"{name}.py"
    # The ops of the extension are not the copy's: their shapes are registered already.
    source = source.replace("native.LOADED", "False").replace('custom_op("mimae::', f'custom_op("{name}::')
    file.write_text(source.replace(old, new))
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    copy = module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy


def run(subject: Subject, check: str, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of the subject's test file, while launchers and kernels are those of a copy of the subject's module."""
    original = import_module(f"mimae.kernels.{subject.module}")
    copy = copy_of(original, old, new, folder)
    test = import_module(f"tests.kernels.{TEST_FILES.get(subject.module, f'test_{subject.module}')}")
    replaced = {
        name: value
        for name, value in vars(original).items()
        if isinstance(value, KernelInterface) or name in ("forward", "backward", "places")
    }
    for name in replaced:
        monkeypatch.setattr(original, name, getattr(copy, name))
    for name, value in list(vars(test).items()):
        if value is original:
            monkeypatch.setattr(test, name, copy)
        elif name in replaced and value is replaced[name]:
            monkeypatch.setattr(test, name, getattr(copy, name))
    subject.checks[check](test, monkeypatch)


@pytest.mark.parametrize(
    ("subject", "check"), [pytest.param(s, c, id=f"{s.module}-{c}") for s in SUBJECTS for c in s.checks]
)
def test_an_unchanged_copy_passes(
    subject: Subject, check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a mutant fails by its mutation and not by being a copy."""
    header = "from __future__ import annotations\n"
    run(subject, check, header, header + "\n", tmp_path, monkeypatch)


MUTANTS = [
    pytest.param(
        subject, check, old, new, id=f"{subject.module}-{lost}", marks=[pytest.mark.slow] if place >= 4 else []
    )
    for subject in SUBJECTS
    for place, (lost, check, old, new) in enumerate(subject.mutations)
]
"""Four of each module in every run, the others among the slow tests."""


@pytest.mark.parametrize(("subject", "check", "old", "new"), MUTANTS)
def test_a_mutant_fails(
    subject: Subject, check: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError):
        run(subject, check, old, new, tmp_path, monkeypatch)
