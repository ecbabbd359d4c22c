"""Tests of SLURM jobs: the submitted script, the arguments of `sbatch`, and the effect of a signal on the job."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mimae.errors import EXIT_SAVED, UserError
from mimae.launch import command, submit
from mimae.launch import processes as launch
from mimae.launch.submit import Training, minutes

pytest.importorskip("submitit", reason="submitit is an extra")


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("12:00:00", 720), ("00:00:01", 1), ("2-00", 2880), ("1-12:30:00", 2190), ("10:30", 11)],
)
def test_slurms_forms_of_a_time(time: str, expected: int) -> None:
    """SLURM's `10:30` is ten and a half minutes. Seconds are rounded up."""
    assert minutes(time) == expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"time": "3"}, "--time 3: SLURM's signal to save comes 180 s"),
        ({"time": "00:04:00"}, "legal are 5 minutes or more"),
        ({"nodes": 3, "gpus": 7}, "schedule.batch_size = 256 does not divide into 21 ranks"),
        ({"overrides": ["engine.kind=fsdp", "engine.replicas=3"]}, "engine.replicas=3 does not divide the 8 ranks"),
        ({"seeds": "1,1"}, "two jobs would share a run directory"),
        ({"seeds": "1,x"}, "--seeds 1,x: legal is a list of integers"),
    ],
)
def test_what_a_job_could_only_fail_of_is_told_before_the_queue(
    cluster: Path, tmp_path: Path, options: dict, told: str
) -> None:
    overrides = [f"run.dir={tmp_path / 'run'}", "schedule.batch_size=256", *options.pop("overrides", [])]
    with pytest.raises(UserError, match=told):
        submit_quickstart(tmp_path / "run", overrides=overrides, **options)
    assert not (cluster / "calls").exists()


def test_the_shortest_job_is_legal() -> None:
    assert submit.check_time("5") == 5


def test_a_time_that_is_none_is_told() -> None:
    with pytest.raises(UserError, match="--time tomorrow: legal are minutes"):
        minutes("tomorrow")


def submit_quickstart(folder: Path, **options: object) -> None:
    given = {
        "nodes": 2,
        "gpus": 4,
        "time": "24:00:00",
        "partition": "long",
        "account": "lab",
        "cpus": 12,
        "restarts": 3,
    }
    left_open = dict.fromkeys(("qos", "constraint", "memory", "container", "seeds"))
    arguments: dict = {"overrides": [f"run.dir={folder}"], **given, **left_open, "dry_run": False, **options}
    command.submit("quickstart", **arguments)


def test_the_script_of_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit_quickstart(tmp_path / "run", dry_run=True, container="image.sqsh")
    script = capsys.readouterr().out
    for line in (
        *("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=48", "--partition=long"),
        *("--account=lab", "--time=1440", "--requeue", f"--signal=USR1@{submit.GRACE_SECONDS}"),
    ):
        assert f"#SBATCH {line}\n" in script
    assert "--container-image=image.sqsh python -u -m" in script and not (tmp_path / "run").exists()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of commands that replace SLURM's and record their arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "sbatch", "scontrol"):
        file = folder / name
        file.write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/calls\necho Submitted batch job 77\n')
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


def test_an_array_has_a_run_for_each_seed(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit_quickstart(tmp_path / "run", seeds="0,3")
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[2].rstrip(";") for line in told] == [f"{tmp_path}/run/seed-{seed}" for seed in (0, 3)]
    (call,) = (cluster / "calls").read_text().splitlines()
    script = Path(call.split()[1]).read_text()
    assert "#SBATCH --array=0-1" in script


def test_an_illegal_seed_is_found_before_the_queue(cluster: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"seed = -1 \(override\): legal is an integer at least 0"):
        submit_quickstart(tmp_path / "run", seeds="0,-1")
    assert not (cluster / "calls").exists() and not (tmp_path / "run").exists()


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no srun on this machine"):
        submit_quickstart(tmp_path / "run")


@pytest.mark.parametrize(
    ("code", "node", "queued"), [(EXIT_SAVED, "0", True), (EXIT_SAVED, "1", False), (0, "0", False)]
)
def test_a_run_that_saved_is_queued_again_by_one_node(
    code: int, node: str, queued: bool, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "train", lambda *_: code)
    monkeypatch.setenv("SLURM_NODEID", node)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert Training("quickstart", (), 1, 3)() == code
    calls = cluster / "calls"
    assert (calls.read_text() if calls.exists() else "") == ("scontrol requeue 77\n" if queued else "")
