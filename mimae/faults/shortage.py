"""Report of a memory shortage: its phase, the memory in use, the planner's advice, and a snapshot file."""

from __future__ import annotations

import gc
import json
import mmap
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import clear_frames
from typing import Any, get_args

import torch
from torch import Tensor

from mimae import distributed
from mimae.config.recipe import Recipe, RunRecipe
from mimae.errors import RunError
from mimae.faults.watchdog import Watchdog
from mimae.model.settings import Checkpointing
from mimae.outside.files import Folder
from mimae.plan.advice import advise
from mimae.plan.cost import Fleet
from mimae.plan.gpus import GPU, device_name, find_gpu
from mimae.plan.memory import Layout, memory, parameters
from mimae.telemetry.clock import IN_PHASE

HISTORY = 50_000
"""Number of allocations and frees that a snapshot of a GPU's memory shows, the last ones: about ten steps."""

LISTED = 100
"""Number of tensors in the snapshot of a CPU's memory: the largest ones."""

_RESERVE = 32 << 20

_WORDS = re.compile(r"can't allocate memory|cannot allocate memory|bad_alloc|ALLOC_FAILED|out of memory", re.IGNORECASE)


class MemoryShortage(RunError):
    """An allocation that failed. A restart with the same settings would fail again."""


@contextmanager
def explained(recipe: RunRecipe, device: torch.device, watchdog: Watchdog) -> Iterator[None]:
    """Raise MemoryShortage for an allocation that fails inside the block, and write a snapshot to RUN/memory."""
    if device.type == "cuda":
        # Without a history, a snapshot shows the memory in use without the stacks that allocated it.
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=HISTORY)
    # Address space that is never touched, and given back for the words and the snapshot: the allocation that failed may
    # have been a small one, with nothing left below the limit.
    reserve = mmap.mmap(-1, _RESERVE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_shortage(error):
            raise
        reserve.close()
        phase = "".join(f"{note.removeprefix(IN_PHASE)} of " for note in getattr(error, "__notes__", ())[:1])
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        lines = [
            f"memory ran out on rank {distributed.rank()} in {phase}{watchdog.due}"
            f"{f', which asked for {asked[1]}' if asked else ''}; {held(device)}",
            _snapshot(Path(recipe.run.dir), device),
        ]
        # Free the memory of the failed step: the planner needs some too.
        clear_frames(error.__traceback__)
        ranks = distributed.world_size()
        lines.append(advice(recipe, ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks))))
        raise MemoryShortage("\n".join(lines)) from error
    finally:
        if device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)


def is_shortage(error: BaseException) -> bool:
    """Return whether an error means that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _WORDS.search(str(error)) is not None


def held(device: torch.device) -> str:
    """Return a text with the memory that this process uses, and its limit."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        mine, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return (
            f"tensors hold {_gib(mine)}, the allocator {_gib(reserved)}, all processes together {_gib(total - free)} "
            f"of the GPU's {_gib(total)}"
        )
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return f"the process holds {_gib(resident)} of its limit of {_gib(_limit())}"


def _limit() -> int:
    """Return this process's memory limit in bytes: the machine's memory, or a lower limit of the process or cgroup."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", file).read_text()))
    return min(limit for limit in limits if limit != resource.RLIM_INFINITY)


def advice(recipe: RunRecipe, ranks: int, per_node: int) -> str:
    """Return the planner's counts for the recipe on `ranks` ranks and for settings that take less memory.

    On GPUs that the planner knows, name the engine that it would choose.
    """
    if not isinstance(recipe, Recipe):
        return (
            "less memory is taken with a larger schedule.accumulate or a smaller schedule.batch_size, with "
            "model.checkpointing=full, and over several ranks with engine.kind=fsdp"
        )
    count = parameters(recipe)
    engine, schedule = recipe.engine, recipe.schedule
    images = max(1, schedule.batch_size // (ranks * schedule.accumulate))
    layout = Layout(engine.kind, ranks, engine.replicas, engine.offload)
    on_gpu = torch.cuda.is_available()

    def planned(layout: Layout, recipe: Recipe = recipe, images: int = images) -> str:
        return _gib(memory(recipe, layout, images, count=count, ops="fused" if on_gpu else "plain").total)

    lines = [
        f"the planner counts for each of {ranks} ranks, without libraries:",
        f"  as it is: {planned(layout)}",
    ]
    # On a CPU offloading does not move anything.
    spread = [Layout("fsdp", ranks), Layout("zero3", ranks)]
    spread += [Layout(other.kind, ranks, offload="cpu") for other in spread] if on_gpu else []
    lines += [f"  {other.settings}: {planned(other)}" for other in spread if ranks > 1 and other != layout]
    if images > 1:
        twice = schedule.model_copy(update={"accumulate": 2 * schedule.accumulate})
        split = recipe.model_copy(update={"schedule": twice})
        lines.append(f"  schedule.accumulate={twice.accumulate}: {planned(layout, split, images // 2)}")
    levels = get_args(Checkpointing)
    for level in levels[levels.index(recipe.model.checkpointing) + 1 :]:
        smaller = recipe.model_copy(update={"model": recipe.model.model_copy(update={"checkpointing": level})})
        lines.append(f"  model.checkpointing={level}: {planned(layout, smaller)}")
    if (gpu := _gpu()) is not None:
        fleet = Fleet(gpu, ranks, per_node, share=0.45)
        lines.append(f"for {ranks} x {gpu.name}: {advise(recipe, fleet, count)[1]}")
    return "\n".join(lines)


def _gpu() -> GPU | None:
    """Return the GPU of this machine, or None if the planner does not know it."""
    if not torch.cuda.is_available():
        return None
    with suppress(ValueError):
        return find_gpu(device_name(torch.device("cuda")))
    return None


def _snapshot(run: Path, device: torch.device) -> str:
    """Write a snapshot of the memory, and return a text that names the file."""
    name = f"memory/rank-{distributed.rank()}"
    try:
        if device.type == "cuda":
            file = run / f"{name}.pickle"
            os.close(Folder(run).create(f"{name}.pickle"))
            torch.cuda.memory._dump_snapshot(str(file))
            return f"a snapshot of the GPU's memory, for pytorch.org/memory_viz, is {file}"
        file = run / f"{name}.json"
        Folder(run).replace(f"{name}.json", json.dumps(_tensors(), indent=1))
        return f"the largest tensors are listed in {file}"
    except (OSError, MemoryError) as error:
        return f"no snapshot was written: {str(error) or 'no memory is left for it'}"


def _tensors() -> dict[str, Any]:
    """Return the tensors that Python sees, largest first and each storage once. Autograd's own are not among them."""
    seen: dict[int, dict[str, Any]] = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and not found.is_meta and found.layout is torch.strided:
            with suppress(RuntimeError):  # A wrapper of other tensors has no storage.
                storage = found.untyped_storage()
                seen[storage.data_ptr()] = {
                    "bytes": storage.nbytes(),
                    "shape": list(found.shape),
                    "dtype": str(found.dtype).removeprefix("torch."),
                    "parameter": isinstance(found, torch.nn.Parameter),
                }
    largest = sorted(seen.values(), key=lambda each: -each["bytes"])
    return {"bytes": sum(each["bytes"] for each in largest), "tensors": len(largest), "largest": largest[:LISTED]}


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
