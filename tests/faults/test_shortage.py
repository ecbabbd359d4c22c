"""Tests of a lack of memory: the message has the phase, the planner's advice and the largest tensors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimae.faults import shortage
from mimae.faults.shortage import MemoryShortage, explained, is_shortage
from mimae.faults.watchdog import Watchdog
from mimae.telemetry.clock import Phases
from tests.train.test_trainer import recipe

LIMITED = """
import re, resource, sys
from pathlib import Path
from mimae.errors import UserError
from mimae.train.tasks.pretrain import pretrain
from tests.train.test_trainer import recipe

images, run = Path(sys.argv[1]), Path(sys.argv[2])
wide = recipe(images, run, "schedule.accumulate=1", "decoder.width=256", "data.image_size=128", "masking.num_masks=4")
(kib,) = re.findall(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())
limit = int(kib) * 1024 + 250 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    pretrain(wide)
except UserError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), 30 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_an_allocation_that_fails_is_told_with_advice_and_a_snapshot(images: Path, tmp_path: Path) -> None:
    """In a real run the activations exceed the memory limit of the process."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, images, tmp_path / "run"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    first, snapshot, *advice = done.stdout.strip().splitlines()[-7:]
    assert re.fullmatch(
        r"memory ran out on rank 0 in forward of step 1, .*, which asked for \d+ bytes; "
        r"the process holds [\d.]+ GiB of its limit of [\d.]+ GiB",
        first,
    )
    listed = json.loads(Path(snapshot.removeprefix("the largest tensors are listed in ")).read_text())
    assert listed["largest"][0]["bytes"] > 2**20 and listed["bytes"] > listed["largest"][0]["bytes"]
    assert [line.partition(":")[0].strip() for line in advice] == [
        "the planner counts for each of 1 ranks, without libraries",
        "as it is",
        "schedule.accumulate=2",
        "model.checkpointing=selective",
        "model.checkpointing=full",
    ]
    whole, *smaller = [float(line.rpartition(": ")[2].removesuffix(" GiB")) for line in advice[1:]]
    assert whole > 0.5 and max(smaller) < whole


def test_engines_that_spread_are_counted_where_there_are_ranks(images: Path, tmp_path: Path) -> None:
    told = shortage.advice(recipe(images, tmp_path, "engine.kind=fsdp"), ranks=4, per_node=4)
    assert "for each of 4 ranks" in told and "engine.kind=zero3: " in told and "engine.kind=fsdp: " not in told


@pytest.mark.parametrize(
    ("error", "phase"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "backward"),
        (MemoryError(), "optimizer"),
        (OSError(12, "Cannot allocate memory"), "data"),
    ],
)
def test_every_kind_of_shortage_names_its_phase(images: Path, tmp_path: Path, error: Exception, phase: str) -> None:
    device = torch.device("cpu")
    watchdog = Watchdog(tmp_path, 0, 0)
    watchdog.wait_for("step 7")
    asked = ", which asked for 2.00 GiB" if "2.00" in str(error) else ""
    with (
        pytest.raises(MemoryShortage, match=rf"ran out on rank 0 in {phase} of step 7{asked}; "),
        explained(recipe(images, tmp_path), device, watchdog),
        Phases(device)(phase),
    ):
        raise error


def test_other_errors_pass(images: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="shapes do not fit"),
        explained(recipe(images, tmp_path), torch.device("cpu"), Watchdog(tmp_path, 0, 0)),
    ):
        raise RuntimeError("shapes do not fit")
    assert not is_shortage(OSError(28, "No space left on device"))
