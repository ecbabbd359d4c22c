"""Tests of the memory at the peak of a step, with allocations made by hand."""

from __future__ import annotations

from mimae.report.profile.memory import Allocation, Known, Span, Trace, at_peak

MARKS = [
    Span(0, 50, "step"),
    Span(0, 20, "forward"),
    Span(20, 50, "backward"),
    Span(100, 200, "step"),
    Span(110, 140, "forward"),
    Span(112, 138, "encoder.blocks.0"),
    Span(140, 190, "backward"),
]


def trace(*allocations: tuple[int, int, int]) -> Trace:
    """Return the memory for `allocations` (time, address, bytes). Before: weights (100 bytes), optimizer (200)."""
    before = [Allocation(-9, 1, 100), Allocation(-8, 2, 200)]
    made = [*before, *(Allocation(*each) for each in allocations)]
    return Trace(sorted(made), MARKS, [(150, 170, 7), (170, 180, -1)], {7: 120})


def test_the_peak_is_divided_into_categories() -> None:
    found = at_peak(
        trace(
            (115, 10, 40),  # kept for backward
            (116, 11, 500),  # an intermediate of forward
            (117, 11, -500),
            (155, 12, 100),  # a gradient, allocated in each step
            (158, 13, 600),  # workspace of the node
            (165, 13, -600),
            (175, 10, -40),
        ),
        Known(weights=100, gradients=100, optimizer=200, buffers=0),
    )
    assert (found.peak, found.total) == (1040, 1040)
    assert (found.activations, found.gradients, found.work) == (40, 100, 600)
    assert found.owner == "backward of encoder.blocks.0"
    assert found.kept == {"encoder.blocks.0": 40}


def test_gradients_that_stay_between_steps_are_no_work() -> None:
    found = at_peak(
        trace((115, 10, 40), (158, 13, 60), (165, 13, -60), (172, 14, 70), (173, 14, -70)),
        Known(weights=100, gradients=100, optimizer=200, buffers=0, keeps_gradients=True, before=100),
    )
    assert (found.peak, found.total) == (510, 510)
    assert (found.gradients, found.work, found.owner) == (100, 70, "gradients")


def test_what_a_forward_will_not_leave_behind_is_work() -> None:
    found = at_peak(
        trace((115, 10, 40), (120, 11, 900), (130, 11, -900), (175, 10, -40)),
        Known(weights=100, gradients=100, optimizer=200, buffers=0),
    )
    assert (found.peak, found.activations, found.owner) == (1240, 40, "encoder.blocks.0")
    assert found.work + found.gradients == 900


def test_an_address_that_is_used_again_is_another_allocation() -> None:
    found = at_peak(
        trace((10, 10, 300), (15, 10, -300), (115, 10, 40), (175, 10, -40)),
        Known(weights=100, gradients=0, optimizer=200, buffers=0),
    )
    assert (found.peak, found.activations) == (340, 40), "the step before does not count"
