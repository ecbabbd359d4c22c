"""Tests of checkpoints on disk: writing, retention, verification and refusal."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimae import distributed
from mimae.bench.machine import resident_peak
from mimae.checkpoints import checkpoint, dcp
from mimae.checkpoints.saving import Saver
from mimae.checkpoints.settings import CheckpointSettings
from mimae.errors import CheckpointError, RunError
from mimae.outside.files import Folder
from mimae.randomness import Part
from tests.rank_processes import run_ranks


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    distributed.setup()
    yield
    distributed.shutdown()


STATE = {"data": "images", "steps": 100}
"""Entries that every state has."""


def saver(run: Path, **settings: Any) -> Saver:
    return Saver(run, CheckpointSettings(**settings), torch.device("cpu"))


def save(saver: Saver, step: int, value: float = 1.0, **state: Any) -> bool:
    saver.start(step, {"model.w": torch.full((2, 3), value)}, STATE | state)
    return saver.finish()


def steps(run: Path) -> list[int]:
    return sorted(int(name[5:]) for name in checkpoint.names(run))


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (2, 2, 3, 2), (1, 5)])
def test_boxes_hold_a_range_and_nothing_else(shape: tuple[int, ...]) -> None:
    """All ranges of a tensor of up to 24 elements are tested, also those that begin or end inside a row."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel()):
        for length in range(whole.numel() - start + 1):
            found = [
                whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten()
                for offsets, sizes in dcp.boxes(start, length, shape)
            ]
            assert torch.cat([torch.empty(0, dtype=torch.long), *found]).tolist() == [*range(start, start + length)]
            assert len(found) <= max(1, 2 * len(shape) - 1)


def _parts(bounds: list[int], values: Tensor) -> Part:
    """Return this rank's part of a tensor; `bounds` are the borders of all parts."""
    start, end = bounds[distributed.rank()], bounds[distributed.rank() + 1]
    return Part(values.flatten()[start:end].clone(), start, values.shape)


def _save_and_load_in_other_parts(path: Path) -> list[Tensor]:
    whole = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    saved = {"w": _parts([0, 13, 13, 35], whole), "b": Part(whole[0], 0, whole[0].shape)}
    dcp.save(path, saved | {"s": torch.tensor(3.0)}, distributed.host_group(), None)
    found, b, s = _parts([0, 1, 30, 35], torch.zeros(5, 7)), torch.zeros(7), torch.zeros(())
    dcp.load(path, {"w": found, "b": b, "s": s})
    return [found.values - _parts([0, 1, 30, 35], whole).values, b - whole[0], s - 3]


def test_what_ranks_hold_in_parts_others_read_in_other_parts(tmp_path: Path) -> None:
    """The parts are cut inside rows, and one rank has none. torch's own tools read the same whole tensor."""
    distributed.shutdown()
    path = tmp_path / "state"
    assert all(not t.any() for rank in run_ranks(3, tmp_path, _save_and_load_in_other_parts, path) for t in rank)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(path, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt")
    assert torch.equal(whole["w"], torch.randn(5, 7, generator=torch.Generator().manual_seed(0)))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read as Linux tells it")
def test_what_lies_inside_of_another_tensor_is_written_without_a_copy(tmp_path: Path) -> None:
    """ZeRO's parts are views of one tensor. Here there are 32 of them, with 128 MB together."""
    flat = torch.ones(2**25)
    state = {f"w{i}": Part(piece, 0, piece.shape) for i, piece in enumerate(flat.split(2**20))}
    dcp.save(tmp_path / "first", {"w": torch.ones(2)}, distributed.host_group(), None)  # one-time allocations
    grown = resident_peak(lambda: dcp.save(tmp_path, state, distributed.host_group(), None))
    assert grown is not None and grown < 32e6
    assert all(each.eq(1).all() for each in dcp.load_whole(tmp_path, "w").values())


def test_what_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    dcp.save(tmp_path, {"a": torch.ones(2)}, distributed.host_group(), None)
    with pytest.raises(CheckpointError, match="lacks b"):
        dcp.load(tmp_path, {"b": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"a is not a tensor of shape \(3,\)"):
        dcp.load(tmp_path, {"a": torch.ones(3)})


def test_a_description_runs_no_code(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CheckpointError, match="mkdir has no place"):
        dcp.load_whole(tmp_path, "")
    assert not (tmp_path / "harm").exists()


def test_the_copy_is_of_the_moment_of_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors change after `settle` has returned, while the file is still being written."""
    changed = threading.Event()
    write = dcp.dcp.FileSystemWriter.write_data

    def late(self: Any, *args: Any) -> Any:
        assert changed.wait(10)
        return write(self, *args)

    monkeypatch.setattr(dcp.dcp.FileSystemWriter, "write_data", late)
    weights, each = torch.ones(3), saver(tmp_path)
    for step in (1, 2):  # The second copy reuses the memory of the first one.
        weights.fill_(step)
        each.start(step, {"model.w": weights}, STATE)
        each.settle()
        weights.fill_(-1)
        changed.set()
        assert each.finish()
        changed.clear()
        found = checkpoint.find(tmp_path)
        assert found is not None and torch.equal(found.tensors("model")["w"], torch.full((3,), float(step)))


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 20])
def test_as_many_are_kept_as_asked_while_there_are_fewer_and_after(keep: int, tmp_path: Path) -> None:
    for step in range(1, 9):
        assert save(saver(tmp_path, keep=keep), step)
        assert steps(tmp_path) == [*range(max(step - keep, 0) + 1, step + 1)]


def test_the_newest_are_kept_and_those_for_good_and_the_best(tmp_path: Path) -> None:
    each = saver(tmp_path, keep=2, best="knn")
    measured = {1: 0.3, 2: 0.9, 3: 0.5, 4: None, 5: 0.6, 6: 0.7}
    for step, knn in measured.items():
        assert save(each, step, for_good=step == 3, measures={} if knn is None else {"knn": knn, "val_rec": step})
    assert steps(tmp_path) == [2, 3, 5, 6]
    assert save(saver(tmp_path, keep=1, best="val_rec"), 7)
    assert steps(tmp_path) == [2, 3, 7], "the smallest val_rec of those that are left is step 2's"
    assert save(saver(tmp_path, keep=1), 8)
    assert steps(tmp_path) == [3, 8]


def test_what_the_run_went_back_behind_is_removed(tmp_path: Path) -> None:
    """A damaged newer checkpoint and an incomplete one do not count as kept checkpoints."""
    for step in (1000, 2000):
        assert save(saver(tmp_path), step)
    os.truncate(tmp_path / "checkpoints/step-00002000/__0_0.distcp", 3)
    (tmp_path / "checkpoints/.step-00001200.tmp").mkdir()
    assert save(saver(tmp_path, keep=1), 1500)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00001500"]
    found = checkpoint.find(tmp_path)
    assert found is not None and found.state["step"] == 1500


def test_what_was_passed_over_takes_no_good_ones_place(tmp_path: Path) -> None:
    """Step 9, saved on a signal, is damaged. The run continues from step 8 and keeps two, or the best: never 9."""
    assert save(saver(tmp_path), 8, measures={"knn": 0.5})
    assert save(saver(tmp_path), 9, measures={"knn": 0.9})
    each = saver(tmp_path, keep=2, best="knn")
    each.passed_over = {"step-00000009"}
    assert save(each, 10)
    assert steps(tmp_path) == [8, 10]


def test_a_step_that_is_passed_again_counts_again(tmp_path: Path) -> None:
    """Steps 9 and 10 were damaged. The checkpoints that the run then writes under the same names count again."""
    for step in (8, 9, 10):
        assert save(saver(tmp_path, keep=3), step)
    each = saver(tmp_path, keep=2)
    each.passed_over = {"step-00000009", "step-00000010"}
    for step, kept in ((9, [8, 9]), (10, [9, 10]), (11, [10, 11])):
        assert save(each, step) and steps(tmp_path) == kept


def test_a_state_that_cannot_be_read_for_once_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that fails for a moment does not make a checkpoint damaged."""
    assert save(saver(tmp_path), 1, for_good=True)
    read = Folder.read

    def failing(folder: Folder, *arguments: Any) -> bytes:
        if "step-00000001" in str(folder.path):
            raise OSError(116, "Stale file handle")
        return read(folder, *arguments)

    monkeypatch.setattr(Folder, "read", failing)
    assert save(saver(tmp_path, keep=1), 2)
    monkeypatch.undo()
    assert steps(tmp_path) == [1, 2] and (tmp_path / "latest").read_text() == "step-00000002\n"
    assert save(saver(tmp_path, keep=1), 3) and steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json"])
def test_every_file_is_verified(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        assert save(saver(tmp_path), step)
    path = tmp_path / "checkpoints/step-00000002" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    found = checkpoint.find(tmp_path)
    assert found is not None and found.state["step"] == 1
    assert f"{path} was altered" in capsys.readouterr().out


def test_what_does_not_fit_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    each = saver(tmp_path)
    assert save(each, 1)
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=23))
    assert not save(each, 2)
    told = capsys.readouterr().out
    assert (
        "checkpoint of step 2 could not be written" in told
        and "does not fit" in told
        and f"the last one in {tmp_path} is step-00000001" in told
    )
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert save(each, 3) and steps(tmp_path) == [1, 3]


def test_who_is_taken_over_in_a_save_commits_nothing_and_begins_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A save takes minutes, so the lock's owner is checked at its end and before the next save changes anything."""
    write, taken = dcp.save, threading.Event()

    def check() -> None:
        if taken.is_set():
            raise RunError("taken over")

    def slow(*args: Any) -> None:
        write(*args)
        taken.set()

    monkeypatch.setattr(dcp, "save", slow)
    each = Saver(tmp_path, CheckpointSettings(), torch.device("cpu"), check_owner=check)
    assert not save(each, 1)
    assert "step 1 could not be written: taken over" in capsys.readouterr().out
    theirs = tmp_path / "checkpoints/.step-00000002.tmp"
    theirs.mkdir()
    with pytest.raises(RunError):
        save(each, 3)
    assert list((tmp_path / "checkpoints").iterdir()) == [theirs]


FULL_DISK = """
import json, sys, torch
from contextlib import suppress
from pathlib import Path
from mimae import distributed
from mimae.checkpoints import checkpoint, dcp
from mimae.checkpoints.settings import CheckpointSettings
from mimae.checkpoints.saving import Saver
from mimae.telemetry.settings import TelemetrySettings
from mimae.telemetry.telemetry import Telemetry

run, filler = Path(sys.argv[1]), Path(sys.argv[1]) / "filler"
distributed.setup()
telemetry = Telemetry(run, TelemetrySettings(trackers=()), is_main=True, total_steps=99)
telemetry.rewind(0)
saver = Saver(run, CheckpointSettings(keep=1), torch.device("cpu"))
tensors = {"model.w": torch.ones(2**18)}  # 1 MB

def save(step):
    saver.start(step, tensors, {"data": "images", "steps": 100})
    return saver.finish()

def record(step):
    telemetry.step({"step": step, "loss": 1.0})

def filled(*args, write=dcp.save):
    "Somebody else fills the disk when there was room a moment before."
    filler.write_bytes(bytes(2**19 * 3 + 2**18))  # of 3 MB
    write(*args)

assert save(1)
dcp.save, write = filled, dcp.save
assert not save(2)
dcp.save = write
with suppress(OSError), filler.open("ab", buffering=0) as file:
    while True:
        file.write(bytes(4096))
for step in range(1, 41):
    record(step)
assert checkpoint.find(run).state["step"] == 1 and len(list((run / "checkpoints").iterdir())) == 1
filler.unlink()
record(41)
telemetry.close()
lines = (run / "metrics.jsonl").read_text().splitlines()
steps = [json.loads(line)["step"] for line in lines]
assert steps == sorted(set(steps)) and len(steps) < 41 and steps[-1] == 41, steps
assert save(3)
assert checkpoint.find(run).state["step"] == 3
"""


def test_a_disk_that_is_full_costs_one_checkpoint(tmp_path: Path) -> None:
    """The test uses a real file system of 3 MB, in a separate mount namespace."""
    script = f"mount -t tmpfs -o size=3m none {tmp_path} && exec {sys.executable} -c '{FULL_DISK}' {tmp_path}"
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace cannot be made here")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2 could not be written" in done.stdout and "1.0 MB are needed, 0.0 are free" in done.stdout
    assert done.stdout.count("metrics.jsonl cannot be written: No space left on device; the run continues") == 1


def _on_rank_1_alone(run: Path) -> tuple[bool, bool, list[str]]:
    """Return the results of a save that fails on rank 1, and of the next save."""
    each = saver(run)
    state = {"model.w": _parts([0, 2, 4], torch.arange(4.0))}
    if distributed.rank() == 1:
        os.environ["FAIL"] = "1"
    describe = checkpoint.describe

    def broken(files: Any) -> Any:
        if os.environ.pop("FAIL", None):
            raise OSError(5, "Input/output error", "the file of rank 1")
        return describe(files)

    vars(checkpoint)["describe"] = broken
    each.start(1, state, STATE)
    first = each.finish()
    each.start(2, state, STATE)
    return first, each.finish(), checkpoint.names(run)


def test_ranks_agree_that_a_save_failed(tmp_path: Path) -> None:
    distributed.shutdown()
    assert run_ranks(2, tmp_path, _on_rank_1_alone, tmp_path / "run") == [(False, True, ["step-00000002"])] * 2


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    assert save(saver(tmp_path), 1, data="x")
    path = tmp_path / "checkpoints/step-00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    assert {*manifest, "manifest.json"} == {file.name for file in path.iterdir()}
    (path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not name the files"):
        checkpoint.load(path)
