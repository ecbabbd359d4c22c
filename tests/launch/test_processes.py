"""Tests of the processes of a run: their start, and the launcher's exit code when they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from mimae.checkpoints import dcp
from mimae.config.load import load_recipe
from mimae.launch import notes
from mimae.launch import processes as launch
from mimae.launch.notes import Note
from mimae.tools import replay
from tests.launched import NOHUP, OURS, TORCHRUN, Launched


def test_the_rank_that_failed_first_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    def advice() -> str:
        return "less memory would do"

    late = Note("error", 0, 1, 20.0, "Traceback of the peer")
    first = Note("error", 3, 1, 10.0, "Traceback of the cause")
    assert launch._tell([first, late], 3, 1, advice) == 1
    told = capsys.readouterr().err
    assert "rank 3 failed first:\nTraceback of the cause" in told and "peer" not in told
    assert launch._tell([late], 2, -signal.SIGKILL, advice) == 1
    told = capsys.readouterr().err
    assert (
        "rank 2 was ended by SIGKILL" in told and "Traceback" not in told and told.endswith("\nless memory would do\n")
    )
    assert launch._tell([Note("mistake", 1, 0, 5.0, "data.path: nothing there"), late], 1, 2, advice) == 2
    assert capsys.readouterr().err == "mimae: data.path: nothing there\n"


def test_notes_of_an_earlier_attempt_are_history_but_for_a_mistake(tmp_path: Path) -> None:
    found = [Note("error", 0, 0, 1.0), Note("mistake", 1, 0, 2.0), Note("error", 1, 1, 4.0), Note("done", 0, 1, 3.0)]
    for note in found:
        (tmp_path / f"note-{note.attempt}-{note.rank}.json").write_text(json.dumps(note._asdict()))
    assert notes.read(tmp_path, 1) == [found[1], found[3], found[2]]
    assert notes.read(tmp_path, 2) == [found[1]], "nothing was said in this attempt"


def test_of_ranks_that_end_together_the_killed_one_is_the_cause() -> None:
    """The other ranks fail when they lose it, and all may be found ended at the same time."""
    ranks = launch._Ranks()
    for rank, script in enumerate(("exit 1", "kill -KILL $$", "exit 0", "sleep 60")):
        ranks.started[rank] = subprocess.Popen(["sh", "-c", script])
    try:
        for rank in range(3):
            ranks.started[rank].wait(10)
        failure = ranks.failure([Note("error", 0, 0, 1.0)])
        assert failure == (1, ranks.started[1].pid, -signal.SIGKILL)
        ranks.end(meanwhile=lambda: None)
        assert ranks.started[3].returncode == -signal.SIGTERM
    finally:
        ranks.send(signal.SIGKILL)


def weights(launched: Launched) -> dict[str, torch.Tensor]:
    found = dcp.load_whole(launched.run / "checkpoints/step-00000012", "")
    return {name: tensor.nan_to_num() for name, tensor in found.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    launched = Launched(tmp_path_factory.mktemp("undisturbed"), 12)
    code, output = launched.end()
    assert code == 0 and "start 2" not in output, output
    return launched


def assert_as_if_undisturbed(launched: Launched, undisturbed: Launched) -> str:
    """Assert that the run was started again and ended with the same weights; return its output."""
    code, output = launched.end()
    assert code == 0 and "start 2, after a rank was lost" in output, output
    got, want = weights(launched), weights(undisturbed)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in got)
    return output


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_undisturbed(
    tmp_path: Path, undisturbed: Launched
) -> None:
    launched = Launched(tmp_path, 12)
    launched.wait_for(lambda: launched.step() >= 7)
    os.kill(launched.ranks()[1], signal.SIGKILL)
    assert_as_if_undisturbed(launched, undisturbed)


@pytest.mark.slow
def test_a_stopped_rank_is_told_and_ended_and_the_run_goes_on(tmp_path: Path, undisturbed: Launched) -> None:
    """The stack of the rank that waited for it is reported. Both end in less than the 30 s that ranks have to end."""
    launched = Launched(tmp_path, 12, "run.step_timeout=5")
    launched.wait_for(lambda: launched.step() >= 7)
    ranks = launched.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    launched.wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), 20)
    output = assert_as_if_undisturbed(launched, undisturbed)
    assert output.count("mimae: nothing moved for 0:00:05") == 1, output
    assert re.search(r"rank 0 in step \d+, the latest call first:\n    File ", output), output
    assert "rank 1 left no stack: stopped (T)" in output and "Traceback" not in output, output


@pytest.mark.slow
def test_a_hang_without_restarts_left_is_told_once(tmp_path: Path) -> None:
    launched = Launched(tmp_path, 100_000, "run.step_timeout=5", "--restarts=0")
    launched.wait_for(lambda: launched.step() >= 2)
    os.kill(launched.ranks()[0], signal.SIGSTOP)
    code, output = launched.end()
    assert code == 1 and output.endswith("see above; run the same command to resume from the last checkpoint\n"), output
    assert output.count("mimae: ") == 2 and "rank 0 left no stack: stopped (T)" in output, output


@pytest.mark.slow
def test_a_step_of_two_ranks_is_replayed_by_one_process(undisturbed: Launched) -> None:
    """The MI terms of the one process get the inputs that two ranks had."""
    given = load_recipe(undisturbed.run / "config.yaml", [*replay.HERE, f"run.dir={undisturbed.run}"]).recipe
    found = replay.replay(given, 12)
    logged = json.loads((undisturbed.run / "metrics.jsonl").read_text().splitlines()[11])
    assert found.losses == {key: pytest.approx(logged[key], rel=1e-4) for key in found.losses}
    assert found.grad_norm == pytest.approx(logged["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_signals_save_on_all_ranks_and_a_launcher_that_dies_leaves_no_process(tmp_path: Path) -> None:
    launched = Launched(tmp_path, 100_000)
    launched.wait_for(lambda: launched.step() >= 2)
    os.killpg(launched.process.pid, signal.SIGINT)  # A terminal sends it to all processes.
    code, output = launched.end()
    assert code == 75 and "saved at step" in output and "Traceback" not in output, output

    launched = Launched(tmp_path, 100_000)  # The same command continues.
    before = launched.step()
    launched.wait_for(lambda: launched.step() >= before + 2)
    ranks = launched.ranks()
    launched.process.kill()
    launched.wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    assert "saved at step" in launched.end()[1].partition("resuming")[2]


@pytest.mark.slow
def test_a_closed_session_saves_a_run_and_leaves_a_nohup_run_alone(tmp_path: Path) -> None:
    """SIGHUP is sent to the whole session: to the launcher, its ranks and their workers."""
    launched = Launched(tmp_path, 100_000, "data.workers=1", "checkpoint.every_steps=100000")
    launched.wait_for(lambda: launched.step() >= 2)
    os.killpg(launched.process.pid, signal.SIGHUP)
    code, output = launched.end()
    assert code == 75 and "saved at step" in output and "Traceback" not in output, output

    launched = Launched(tmp_path, 100_000, by=["-c", NOHUP, *OURS])
    launched.wait_for(lambda: "resuming" in launched.output.read_text())
    os.killpg(launched.process.pid, signal.SIGHUP)
    before = launched.step()
    launched.wait_for(lambda: launched.step() >= before + 3)
    launched.process.terminate()
    assert launched.end()[0] == 75


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_rank_alone_saves_on_sighup_as_on_sigterm(tmp_path: Path, number: signal.Signals) -> None:
    launched = Launched(tmp_path, 100_000, "checkpoint.every_steps=100000", ranks=1)
    launched.wait_for(lambda: launched.step() >= 2)
    launched.process.send_signal(number)
    code, output = launched.end()
    assert code == 75 and "saved at step" in output, output


@pytest.mark.slow
@pytest.mark.parametrize(("by", "expected"), [(OURS, 75), (TORCHRUN, 0)], ids=["launcher", "torchrun"])
def test_sigusr1_on_any_rank_saves_on_all(tmp_path: Path, by: list[str], expected: int) -> None:
    """torchrun would treat any other code as a failure of the worker."""
    launched = Launched(tmp_path, 100_000, "checkpoint.every_steps=100000", by=by)
    launched.wait_for(lambda: launched.step() >= 2)
    os.kill(launched.ranks()[1], signal.SIGUSR1)
    code, output = launched.end()
    assert code == expected and "saved at step" in output and "Traceback" not in output, output
    assert (launched.run / "latest").is_file()


@pytest.mark.slow
def test_a_mistake_that_every_rank_finds_is_told_once(tmp_path: Path) -> None:
    code, output = Launched(tmp_path, 10, "data.path=/nonexistent").end()
    assert code == 2 and output.count("/nonexistent") == 1 and "Traceback" not in output, output
