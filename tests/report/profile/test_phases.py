"""Tests of the assignment of a profiler's events to phases, with events made by hand."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from torch.autograd import DeviceType

from mimae.report.profile.phases import phases

MS = 1_000_000


class Event(NamedTuple):
    """An event in the format of torch.profiler's kineto results; times are in milliseconds."""

    label: str
    begin: int
    end: int
    number: int = -1
    id: int = 0
    linked: int = 0
    device: DeviceType = DeviceType.CPU
    thread: int = 1

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.begin * MS

    def end_ns(self) -> int:
        return self.end * MS

    def duration_ns(self) -> int:
        return (self.end - self.begin) * MS

    def sequence_nr(self) -> int:
        return self.number

    def correlation_id(self) -> int:
        return self.id

    def linked_correlation_id(self) -> int:
        return self.linked

    def device_type(self) -> DeviceType:
        return self.device

    def start_thread_id(self) -> int:
        return self.thread

    def is_user_annotation(self) -> bool:
        return self.label.startswith("mimae: ") and self.device != DeviceType.CPU


NODE = "autograd::engine::evaluate_function: "

HOST = [
    Event("mimae: step", 0, 100),
    Event("mimae: data wait", 0, 10),
    Event("mimae: forward", 10, 40),
    Event("mimae: encoder", 12, 38),
    Event("mimae: encoder.blocks.0", 14, 34),
    Event("aten::linear", 14, 30, number=7, id=1),
    Event("aten::addmm", 16, 28, number=7, id=2),
    Event("aten::item", 30, 33, id=3),
    Event("aten::_local_scalar_dense", 31, 33, id=4),
    Event("aten::add", 35, 37, number=8, id=5),
    Event("mimae: backward", 40, 90),
    Event(NODE + "AddBackward0", 42, 50, number=8),
    Event(NODE + "AddmmBackward0", 50, 75, number=7),
    Event("aten::mm", 52, 70, id=6),
    Event(NODE + "torch::autograd::AccumulateGrad", 75, 80),
    Event("mimae: optimizer", 90, 99),
    Event("aten::elsewhere", 20, 99, thread=2),
]


def test_every_moment_of_a_step_is_in_one_phase() -> None:
    found = phases(HOST, on_cuda=False)
    seconds = {name: (1e3 * phase.forward, 1e3 * phase.backward) for name, phase in found.items()}
    assert seconds == {
        "data wait": (10, 0),
        "encoder": (6, pytest.approx(8)),
        "encoder.blocks.0": (20, pytest.approx(25)),
        "gradients": (0, pytest.approx(5)),
        "optimizer": (9, 0),
        # forward 4, backward 12 outside of its nodes, the step itself 1
        "other": (pytest.approx(17), 0),
    }
    assert sum(phase.seconds for phase in found.values()) == pytest.approx(0.1)
    assert found["encoder.blocks.0"].launches == 3, "linear, item and mm; what they call is theirs"
    assert found["encoder.blocks.0"].waits == 1


def test_two_steps_are_averaged() -> None:
    again = [event._replace(begin=event.begin + 100, end=event.end + 100) for event in HOST]
    once, twice = phases(HOST, on_cuda=False), phases([*again, *HOST], on_cuda=False)
    assert {name: pytest.approx(phase.seconds) for name, phase in once.items()} == {
        name: phase.seconds for name, phase in twice.items()
    }


def test_a_kernel_counts_for_the_phase_whose_operator_launched_it() -> None:
    gpu = DeviceType.CUDA
    kernels = [
        Event("gemm", 30, 60, linked=2, device=gpu),
        Event("backward gemm", 60, 80, linked=6, device=gpu),
        Event("ncclDevKernel_AllReduce", 80, 85, device=gpu),
        Event("mimae: encoder", 30, 60, device=gpu),  # the mark's own shadow on the device is no kernel
    ]
    found = phases([*HOST, *kernels], on_cuda=True)
    assert (found["encoder.blocks.0"].forward, found["encoder.blocks.0"].backward) == pytest.approx((0.03, 0.02))
    assert found["gradient communication"].seconds == pytest.approx(0.005)
    assert found["idle"].seconds == pytest.approx(0.045)
    assert found["encoder.blocks.0"].launches == 2
