"""Running trials: each is one `mimae pretrain`, and `mimae probe` for its checkpoints; it leaves one JSON file.

A trial that has its file is not run again, and an interrupted trial resumes from its checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mimae.bench.controls.time_to import checks_of
from mimae.bench.controls.trials import CHOICES, CONTROLS, RECIPES, Result, Trial
from mimae.bench.machine import describe
from mimae.checkpoints import checkpoint
from mimae.config.kept import load_run
from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe, flat
from mimae.errors import UserError
from mimae.evaluate.probe import MEASURES
from mimae.outside.files import write_atomically
from mimae.outside.progress import track

Runner = Callable[[Trial, Path], Result]
"""Function that trains and probes a trial in a separate folder, and resumes it there after an interruption."""


class Stopped(Exception):
    """The trial was asked to stop and has saved its state."""


def run_trials(trials: Sequence[Trial], out: Path, runs: Path, jobs: int, runner: Runner) -> None:
    """Run the trials without a result in `out`, `jobs` at a time, and write each result when it is there.

    A trial that fails does not stop the others; UserError names the failed ones at the end. Raises Stopped.
    """
    out.mkdir(parents=True, exist_ok=True)
    left = [trial for trial in trials if not finished(trial, out)]
    print(f"{len(trials) - len(left)} of {len(trials)} trials have their result in {out}", flush=True)
    failures = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(runner, trial, runs / trial.name): trial for trial in left}
        for future in track(as_completed(futures), "trials", len(futures)):
            trial = futures[future]
            try:
                result = future.result()
            except UserError as error:
                failures.append(f"{trial.name}: {error}")
                print(f"{trial.name} failed", flush=True)
                continue
            except Stopped:
                continue
            write_atomically(out / f"{trial.name}.json", json.dumps(record(trial, result), indent=2) + "\n")
            scores = " / ".join(f"{result['probe']['features']['this run'][key]:.3f}" for key in MEASURES)
            print(f"{trial.name}: {scores} in {result['seconds']:.0f} s", flush=True)
    if failures:
        raise UserError("\n".join([f"{len(failures)} of {len(left)} trials failed:", *failures]))
    if not all(finished(trial, out) for trial in trials):
        raise Stopped


def finished(trial: Trial, out: Path) -> bool:
    """Return whether `out` has the trial's result. Raises UserError if it has a result of other settings."""
    file = out / f"{trial.name}.json"
    if not file.exists():
        return False
    # Before a key existed, every run behaved as with the key's default.
    old = {**flat(Recipe()), **json.loads(file.read_text())["settings"]}
    if changed := _changed(old, trial.settings):
        raise UserError(
            f"{file} is the result of other settings: {'; '.join(changed)}. Move it away, and the folder of its run, "
            f"to run the trial again, or give another --results and --runs"
        )
    return True


def record(trial: Trial, result: Result) -> Result:
    """Return the content of a result file, without the paths of this machine."""
    known = {key: value for key, value in trial._asdict().items() if key != "paths"}
    return {"bench": "controls", **describe(torch.device("cpu")), **known, **result}


class Processes:
    """Runner of trials: each in separate processes, which are asked to save and stop when this process is."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.stopping = False
        self.lock = threading.RLock()
        self.running: set[subprocess.Popen[bytes]] = set()

    def __call__(self, trial: Trial, run: Path) -> Result:
        run.parent.mkdir(parents=True, exist_ok=True)
        # A recipe of larger batches has shorter epochs: all controls are probed after about the same numbers of steps.
        batch = load_recipe(RECIPES[trial.data]).recipe.schedule.batch_size
        every = max(1, trial.settings["schedule.batch_size"] // batch)
        _check_kept(run, every)
        quiet = ["telemetry.trackers=[]", "telemetry.images_every_epochs=0", "telemetry.probe_every_epochs=0"]
        kept = f"checkpoint.every_epochs={every}"
        ours = [f"run.dir={run}", f"seed={trial.seed}", f"data.workers={self.threads}", kept, *quiet]
        # The CPU seconds of an interrupted run are not known, since its first part is not measured here.
        is_whole = not run.exists()
        with run.with_suffix(".log").open("ab") as log:
            cpu_seconds = self._wait(["pretrain", trial.recipe, *trial.overrides, *trial.paths, *ours], log)
            _check_trained(trial, run)
            epochs = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
            *earlier, end = checks_of(epochs, every)
            timed = earlier if trial.kind in CONTROLS | CHOICES else []
            probes = [check | self._probe(run, check["step"], log)["features"]["this run"] for check in timed]
            self._wait(["probe", str(run), *([] if trial.kind == "mi_mae" else ["--no-baselines"])], log)
            probed = json.loads((run / "probe.json").read_text())
        return {
            "threads": self.threads,
            "seconds": sum(epoch["seconds"] for epoch in epochs),
            "cpu_seconds": cpu_seconds if is_whole else None,
            "probes": [*probes, end | probed["features"]["this run"]],
            "last_epoch": epochs[-1],
            "probe": {key: value for key, value in probed.items() if key not in ("train", "test")},
        }

    def _probe(self, run: Path, step: float, log: Any) -> Result:
        """Probe a checkpoint, and return the content of the file that `mimae probe` writes."""
        one = checkpoint.finished(checkpoint.unfinished(run, int(step)))
        file = run / f"probe-{one.name}.json"
        if not file.exists():  # It exists if the trial was interrupted after this probe.
            self._wait(["probe", str(one), "--no-baselines"], log)
        probed: Result = json.loads(file.read_text())
        return probed

    def _wait(self, arguments: list[str], log: Any) -> float:
        """Run a command to its end, and return the CPU seconds of its processes.

        Raises Stopped if it saved on a signal, UserError if it failed.
        """
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        with self.lock:
            if self.stopping:
                raise Stopped
            process = subprocess.Popen(
                [sys.executable, "-m", "mimae", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which forwards it as a signal to save.
            )
            self.running.add(process)
        _, status, usage = os.wait4(process.pid, 0)  # `Popen.wait` does not return the usage.
        process.returncode = code = os.waitstatus_to_exitcode(status)
        with self.lock:
            self.running.remove(process)
        if self.stopping:
            raise Stopped
        if code:
            tail = Path(log.name).read_text(errors="replace").strip().splitlines()[-3:]
            raise UserError("\n  ".join([f"exit code {code}, the end of {log.name}:", *tail]))
        return usage.ru_utime + usage.ru_stime

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: running trials save and stop, and no new ones start."""
        with self.lock:
            self.stopping = True
            for process in self.running:
                process.terminate()


def _check_kept(run: Path, every: int) -> None:
    """Raise UserError if an existing run does not keep the checkpoints that are probed."""
    if (run / "config.yaml").exists() and load_run(run).checkpoint.every_epochs != every:
        raise UserError(f"{run} did not keep the checkpoints of every {every} epochs. Remove it to train it again")


def _check_trained(trial: Trial, run: Path) -> None:
    """Raise UserError if an existing run was not trained with all settings of its trial.

    A run that is older than a key continues without it.
    """
    trained = flat(load_run(run))
    wanted = {key: value for key, value in trial.settings.items() if key in trained and (key, value) != _ANY_LOADER}
    if changed := _changed(trained, wanted):
        raise UserError(f"{run} was trained with other settings: {'; '.join(changed)}. Remove it to train it again")


_ANY_LOADER = ("data.loader", "auto")


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a text with the `new` settings that differ from `old` or are missing there."""
    return [f"{key} was {old.get(key)!r}, is {value!r}" for key, value in new.items() if old.get(key) != value]
