"""Tests that the files of a run hold each step once, in valid JSON, however the run was killed."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimae.errors import UserError
from mimae.outside.files import Folder
from mimae.telemetry import environment as environments
from mimae.telemetry.environment import environment
from mimae.telemetry.memory import memory
from mimae.telemetry.records import EPOCH_KEYS, read
from mimae.telemetry.settings import TelemetrySettings
from mimae.telemetry.telemetry import Telemetry

QUIET = TelemetrySettings(trackers=())


def records(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def losses(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": step / 40, "samples": 32 * step, "loss": 0.8, "rec": 0.75, **more}


def test_a_step_has_exactly_the_promised_keys(tmp_path: Path) -> None:
    with Telemetry(tmp_path, QUIET, is_main=True, total_steps=100) as telemetry:
        telemetry.step(losses(20, min_mi=-0.1))
    (record,) = records(tmp_path / "metrics.jsonl")
    promised = "step epoch samples loss rec max_mi min_mi fit gate lr grad_norm"
    speed = "image_size images_per_s views_per_s data_wait mem_peak_bytes"
    assert list(record) == [*promised.split(), *speed.split()]
    assert (record["step"], record["min_mi"], record["max_mi"]) == (20, -0.1, None)


def test_a_key_that_nobody_promised_is_a_bug(tmp_path: Path) -> None:
    with (
        Telemetry(tmp_path, QUIET, is_main=True, total_steps=100) as telemetry,
        pytest.raises(AssertionError, match="los"),
    ):
        telemetry.step(losses(20, los=1))


def test_numbers_of_any_kind_are_json(tmp_path: Path) -> None:
    given = {
        "loss": math.nan,
        "rec": torch.tensor(math.inf),
        "max_mi": np.float32("-inf"),
        "min_mi": torch.tensor([1.5]),
        "gate": np.int64(1),
        "lr": torch.tensor(0.25, dtype=torch.bfloat16),
    }
    with Telemetry(tmp_path, QUIET, is_main=True, total_steps=100) as telemetry:
        telemetry.step({**losses(1), **given})
    (record,) = records(tmp_path / "metrics.jsonl")
    assert [record[key] for key in given] == [None, None, None, 1.5, 1, 0.25]


def test_an_epoch_has_every_key_and_the_step_it_ended_at(tmp_path: Path) -> None:
    with Telemetry(tmp_path, QUIET, is_main=True, total_steps=100) as telemetry:
        telemetry.step(losses(40))
        telemetry.epoch({"epoch": 1, "images": 1280, "loss": 0.7, "knn": 0.8})
        telemetry.epoch({"epoch": 2, "step": 80})
    first, second = records(tmp_path / "epochs.jsonl")
    assert list(first) == list(EPOCH_KEYS)
    assert (first["step"], first["knn"], first["val_rec"], first["seconds_backward"]) == (40, 0.8, None, None)
    assert second["step"] == 80


def test_resuming_leaves_each_step_once(tmp_path: Path) -> None:
    with Telemetry(tmp_path, QUIET, is_main=True, total_steps=100) as telemetry:
        for step in (20, 40, 60, 80):
            telemetry.step(losses(step, rec=0.1))
            telemetry.epoch({"epoch": step // 20})
    for name in ("metrics.jsonl", "epochs.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 10')  # incomplete line of a killed process, of a step that would be kept
    with Telemetry(tmp_path, QUIET, is_main=True, total_steps=100) as telemetry:
        telemetry.rewind(40)  # the step of the checkpoint is complete and is kept
        telemetry.step(losses(60, rec=0.2))
        telemetry.rewind(60)  # with the files open
        telemetry.step(losses(80, rec=0.3))
    metrics = records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["rec"]) for r in metrics] == [(20, 0.1), (40, 0.1), (60, 0.2), (80, 0.3)]
    assert [r["epoch"] for r in records(tmp_path / "epochs.jsonl")] == [1, 2]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_kill_loses_no_record_that_was_written(tmp_path: Path) -> None:
    program = (
        "import os, sys, signal\n"
        "from mimae.telemetry.settings import TelemetrySettings as S\n"
        "from mimae.telemetry.telemetry import Telemetry\n"
        "t = Telemetry(sys.argv[1], S(trackers=()), is_main=True, total_steps=9)\n"
        "t.step({'step': 1, 'epoch': 0.1, 'loss': 1.0}); t.epoch({'epoch': 1})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL
    assert records(tmp_path / "metrics.jsonl")[0]["step"] == 1
    assert records(tmp_path / "epochs.jsonl")[0]["epoch"] == 1


def test_records_are_read_line_by_line(tmp_path: Path) -> None:
    """A file that somebody else wrote may have a line of any length."""
    folder, file = Folder(tmp_path), tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n')
    os.truncate(file, 1 << 26)
    with file.open("ab") as end:
        end.write(b'\n[]\n{"step": 2}\n{"step": "x"}\n{"step": 3')
    tracemalloc.start()
    found = [record["step"] for record in read(folder, "metrics.jsonl")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [1, 2] and peak < 1 << 24
    assert [record["step"] for record in read(folder, "metrics.jsonl", 64, tail=True)] == [2]
    assert [record["step"] for record in read(folder, "metrics.jsonl", 12)] == [1]
    assert not list(read(folder, "epochs.jsonl"))
    file.write_bytes(b" " * (1 << 20) + b'{"step": 3}\n{"step": 4}\n')
    assert [record["step"] for record in read(folder, "metrics.jsonl")] == [4]
    file.write_text("".join(f'{{"step": {step}}}\n' for step in (-1, True, 1e9, 1 << 53, 10**400, 5)).replace("T", "t"))
    assert [record["step"] for record in read(folder, "metrics.jsonl")] == [5]


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Telemetry(tmp_path / "run", QUIET, is_main=False, total_steps=9) as telemetry:
        telemetry.rewind(0)
        telemetry.step(losses(1))
        telemetry.epoch({"epoch": 1})
        telemetry.message("hello")
        telemetry.image("images/a.png", b"")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_plain_lines_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 100.0, 110.0, 130.0])
    monkeypatch.setattr("mimae.telemetry.console.time.monotonic", lambda: next(clock))
    with Telemetry(tmp_path, QUIET, is_main=True, total_steps=1200) as telemetry:
        telemetry.begin(80)
        telemetry.step(losses(100, images_per_s=309.6, data_wait=0.0312, max_mi=0.1))
        telemetry.step(losses(110, loss=math.nan))
    first, second = capsys.readouterr().out.splitlines()
    # 20 steps took 10 s, so 1100 take 550 s. Steps before the resume and the start-up time are not counted.
    shown = "loss 0.800 (rec 0.750, max_mi 0.100)  310 images/s  wait 3.1%  eta 9:10"
    assert first == f"step  100/1200  epoch 2.50  {shown}"
    assert "loss not finite" in second and second.endswith("eta 18:10")


def test_a_bar_with_the_time_left_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with Telemetry(tmp_path, QUIET, is_main=True, total_steps=500_000) as telemetry:
        telemetry.message("before [the first] step")
        telemetry.step(losses(300, images_per_s=12_310.0, data_wait=0.1))
        telemetry.message("above the bar")
    shown = terminal.getvalue()
    assert "before [the first] step" in shown and "above the bar" in shown
    bar = next(line for line in shown.splitlines() if "300/500000" in line)
    assert "loss 0.800  12310 images/s  wait 10.0%" in bar and "left" in bar  # the whole line fits into 80 columns


def test_tensorboard_has_the_scalars_and_the_picture(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    png = io.BytesIO()
    Image.new("RGB", (3, 2), (255, 0, 0)).save(png, "PNG")
    with Telemetry(tmp_path, TelemetrySettings(), is_main=True, total_steps=9) as telemetry:
        telemetry.step(losses(1, fit=math.nan))
        telemetry.step(losses(2))
        telemetry.image("images/epoch-0001.png", png.getvalue())
        telemetry.step(losses(3))
    with Telemetry(tmp_path, TelemetrySettings(), is_main=True, total_steps=9) as telemetry:
        telemetry.rewind(2)
        telemetry.step(losses(3, loss=0.5))
    assert (tmp_path / "images/epoch-0001.png").read_bytes() == png.getvalue()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, pytest.approx(0.8)), (2, pytest.approx(0.8)), (3, 0.5)
    ]  # fmt: skip
    assert "train/fit" not in events.Tags()["scalars"]  # a NaN is a gap in the curve
    (image,) = events.Images("images")
    assert (image.step, image.width, image.height) == (2, 3, 2)


def test_missing_tensorboard_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install tensorboard.*telemetry\.trackers=\[\]"):
        Telemetry(tmp_path, TelemetrySettings(), is_main=True, total_steps=9)
    Telemetry(tmp_path, QUIET, is_main=True, total_steps=9).close()


def test_memory_of_the_process_on_the_cpu() -> None:
    before = memory(torch.device("cpu"))["mem_peak_bytes"]
    held = b"x" * (256 << 20)
    after = memory(torch.device("cpu"))
    assert before is not None and after["mem_peak_bytes"] is not None
    assert len(held) <= after["mem_peak_bytes"] < 64 << 30  # bytes, not KiB or pages
    assert before > 50 << 20  # torch alone
    assert after["mem_reserved_bytes"] is None


def test_environment_tells_versions_and_no_names() -> None:
    text = environment()
    facts = json.loads(text)
    assert torch.__version__.startswith(facts["packages"]["torch"].split("+")[0])
    assert facts["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert (facts["driver"] is None) == (not facts["gpus"])
    if (Path(__file__).parents[2] / ".git").exists():
        assert len(facts["git"]["commit"]) == 40
    assert str(Path.home()) not in text and os.uname().nodename not in text


def test_a_gpu_is_told_with_driver_and_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read lines in the format of nvidia-smi on a machine with two GPUs."""
    lines = ["570.86.15, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W"] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environments, "_nvidia_smi", lambda fields: lines)
    facts = environments.gpu_facts()
    assert facts["driver"] == "570.86.15" and len(facts["gpu_clocks"]) == 2
    assert (facts["gpu_clocks"][0]["clocks.sm"], facts["gpu_clocks"][0]["power.limit"]) == ("1980 MHz", "700.00 W")
    lines.clear()
    assert environments.gpu_facts()["driver"] is None
