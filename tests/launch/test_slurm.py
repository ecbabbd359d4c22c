"""Tests of the role of a process by SLURM's variables: a rank, the launcher of a node, or an error message."""

from __future__ import annotations

import pytest

from mimae.errors import UserError
from mimae.launch import slurm
from mimae.launch.job import Job, default_job

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "gpu[01-02]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_TASKS_PER_NODE": "4,3",
}


@pytest.mark.parametrize(
    ("short", "hosts"),
    [
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("a", ["a"]),
        ("rack[1-2]-ib", ["rack1-ib", "rack2-ib"]),
    ],
)
def test_slurms_short_form_of_hosts(short: str, hosts: list[str]) -> None:
    assert slurm.hosts(short) == hosts


def test_what_stands_for_too_many_nodes_takes_no_memory() -> None:
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST='gpu"):
        slurm.join(SLURM | {"SLURM_JOB_NODELIST": "gpu[1-99999999999]"}, has_terminal=False)
    assert slurm.tasks_per_node("4(x999999999),3") == [4] * slurm.MOST_NODES


def test_a_task_of_srun_becomes_a_rank() -> None:
    environment = dict(SLURM)
    assert slurm.join(environment, has_terminal=False)
    ours = {key: environment[key] for key in environment.keys() - SLURM.keys()}
    assert ours == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu01", "MASTER_PORT": "24242",
    }  # fmt: skip


def test_one_task_a_node_is_a_launcher_of_that_node(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert not slurm.join(environment, has_terminal=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert default_job(8, 1, None, 3) == Job(8, 2, "gpu01:24242", 3)


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}],
)
def test_without_srun_nothing_is_joined(environment: dict[str, str]) -> None:
    """The second case is the shell of an allocation, the third a batch script: they have SLURM's variables, but no
    step.
    """
    before = dict(environment)
    assert not slurm.join(environment, has_terminal=False) and environment == before


@pytest.mark.parametrize(
    ("nodes", "rendezvous", "told"),
    [(2, None, "go together"), (1, "host:1", "go together"), (2, "host:port", "legal is HOST:PORT")],
)
def test_options_that_do_not_fit_are_told(nodes: int, rendezvous: str | None, told: str) -> None:
    with pytest.raises(UserError, match=told):
        default_job(2, nodes, rendezvous, 3)


def test_a_shell_of_several_tasks_is_told_before_it_waits_for_the_others() -> None:
    """With `srun --pty --ntasks=7 bash` SLURM's variables describe seven ranks, but there is one interactive shell."""
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS=7: this shell is one of 7 tasks of `srun --pty`"):
        slurm.join(dict(SLURM), has_terminal=True)
    alone = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert not slurm.join(alone, has_terminal=True)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("SLURM_STEP_NUM_TASKS", "7x", "SLURM_STEP_NUM_TASKS='7x'"),
        ("SLURM_PROCID", "-1", "SLURM_PROCID='-1'"),
        ("SLURM_NODEID", "two", "SLURM_NODEID='two'"),
        ("SLURM_NODEID", "5", "SLURM_NODEID=5 and SLURM_TASKS_PER_NODE=4,3"),
        ("SLURM_JOB_NODELIST", "gpu[a-b]", "SLURM_JOB_NODELIST='gpu"),
        ("SLURM_JOB_NODELIST", "", "neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST"),
        ("SLURM_JOB_ID", "?", "SLURM_JOB_ID='?'"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(name: str, value: str, told: str) -> None:
    with pytest.raises(UserError, match=told.replace("[", r"\[").replace("?", r"\?")):
        slurm.join(SLURM | {name: value}, has_terminal=False)


def test_variables_of_an_earlier_job_do_not_outlive_srun() -> None:
    """A batch script often exports WORLD_SIZE and MASTER_PORT for programs that read them."""
    environment = SLURM | {"WORLD_SIZE": "99", "MASTER_PORT": "1"}
    assert slurm.join(environment, has_terminal=False)
    assert (environment["WORLD_SIZE"], environment["MASTER_PORT"]) == ("7", "24242")
