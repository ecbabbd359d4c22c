"""`mimae plan --dry-run`: two steps of one rank of a large run, executed on this CPU and compared with the plan.

Engine, model, ops and optimizer are those of a run on GPUs. Tensors are fake: they have a shape and no memory, and the
process group answers at once. So everything that does not depend on values can be counted: the rank's share of the
weights, the bytes that are alive at any time, and every collective. Temporary memory inside an op is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimae import kernels
from mimae.engines import fsdp
from mimae.engines.base import Engine, Obstacles, Setup
from mimae.engines.make import check_machine, make_engine, setup_of
from mimae.errors import UserError
from mimae.model.groups import groups
from mimae.model.masking import views
from mimae.model.mimae import obstacles, outline
from mimae.objective.costs import FP32
from mimae.objective.objective import Losses
from mimae.outside.progress import track
from mimae.outside.text import say
from mimae.plan.communication import Traffic, traffic
from mimae.plan.gpus import GPU
from mimae.plan.memory import Layout, Memory, kept, memory, parameters
from mimae.randomness import Part, initialise

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe

TOLERANCE = 0.1
"""Largest relative difference between planned and counted."""

_COLLECTIVES = {
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
}
"""Kind of collective by operator, and the position of the argument that is the whole tensor."""


class Collective(NamedTuple):
    """One call of a collective on one rank."""

    phase: str
    """Phase of the call: forward, backward or optimizer."""
    kind: str
    ranks: int
    bytes: int
    """Shape of the whole tensor."""

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a ring."""
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.ranks - 1) / self.ranks


class Counted(NamedTuple):
    """Counts of the second step of a rank, in bytes."""

    parts: dict[str, Part]
    """The rank's shares of the parameters, by name."""
    shares: int
    """Number of ranks whose shares make the whole parameters; `place` is the position of this rank among them."""
    place: int
    weights: int
    gradients: int
    optimizer: int
    kept: int
    """Bytes that the last micro-batch's forward keeps, including the weights that stay gathered."""
    peak: int
    collectives: list[Collective]
    losses: Any


class Watch(TorchDispatchMode):
    """Counter of collectives, and of the bytes of all live storages that operators allocate inside the block."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        """Start with the storages of `held`, the tensors that exist before."""
        super().__init__()
        self.live = self.peak = 0
        self.phase = ""
        self.collectives: list[Collective] = []
        self._sizes: dict[int, int] = {}
        for tensor in held:
            self._see(tensor.untyped_storage())

    def __enter__(self) -> Self:
        # FSDP frees gathered weights by resizing their storages, which bypasses the dispatcher.
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self._see(storage)

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("c10d::"):
            kind, place = _COLLECTIVES.get(name, (name, 0))
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            bytes = sum(tensor.nbytes for tensor in tree_leaves(args[place]))
            self.collectives.append(Collective(self.phase, kind, group.size(), bytes))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self._see(each.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key).atexit = False
        self.live += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class Job(NamedTuple):
    """A training step of any task, on fake tensors."""

    setup: Setup
    obstacles: Obstacles
    engine: Callable[[], Engine[Any]]
    batch: Callable[[], Any]
    """Makes what a micro-batch of a rank has on its device, with the next one, which is there too in training."""
    forward: Callable[[Engine[Any], Any], tuple[Tensor, Any]]
    """Returns the loss of a batch, and the losses that are shown."""


def count_step(recipe: Recipe, ranks: int, rank: int) -> Counted:
    """Count a step of pretraining on `rank` among `ranks`. Raises UserError for settings that a CPU cannot execute."""
    images = recipe.schedule.batch_size // (ranks * recipe.schedule.accumulate)
    rule = groups(recipe.optimizer, recipe.schedule.batch_size, recipe.masking.num_masks)
    setup, device = setup_of(recipe), torch.device("cpu")

    def batch() -> list[Tensor]:
        return [torch.empty(images, *recipe.data.size_hw, 3, dtype=torch.uint8) for _ in range(2)]

    def forward(engine: Engine[Any], batch: list[Tensor]) -> tuple[Tensor, Losses]:
        visible, targets = views(recipe, 0, 0, torch.arange(images))
        losses = engine.forward(batch[0], visible, targets)
        return losses.loss, losses

    def engine() -> Engine[Any]:
        return make_engine(outline(recipe), setup, device, rule, lambda m, parts: initialise(m, recipe.seed, parts))

    return count(Job(setup, obstacles(recipe, device), engine, batch, forward), ranks, rank)


def count(job: Job, ranks: int, rank: int) -> Counted:
    """Count a step of `rank` among `ranks`. Raises UserError for settings that a CPU cannot execute."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        check_machine(job.setup, torch.device("cpu"), job.obstacles)
        with FakeTensorMode(), _real_meshes(), kernels.prefer("triton"):
            return _count(job)
    finally:
        dist.destroy_process_group()


def _count(job: Job) -> Counted:
    engine = job.engine()
    held = [*engine.model.buffers(), *(part.values for part in engine.parts.values()), *engine.ema.values()]
    with Watch(held) as watch:
        _step(job, engine, watch)  # This step allocates the optimizer's moments.
        watch.collectives.clear()
        watch.peak = watch.live
        gradients, kept, losses = _step(job, engine, watch)
    moments = [value for kinds in engine.optimizer.stepper.state().values() for value in kinds.values()]
    return Counted(
        engine.parts,
        dist.get_world_size(engine.group),
        dist.get_rank(engine.group),
        _bytes(part.values for part in engine.parts.values()),
        gradients,
        _bytes([*moments, *engine.ema.values()]),
        kept,
        watch.peak,
        watch.collectives,
        losses,
    )


def _step(job: Job, engine: Engine[Any], watch: Watch) -> tuple[int, int, Any]:
    """Run a step as the trainer does; return bytes of gradients, bytes kept by the last forward, and losses."""
    accumulate, batch = job.setup.accumulate, job.batch()
    for micro in range(accumulate):
        watch.phase = "forward"
        before = watch.live
        with engine.accumulate(is_last=micro == accumulate - 1):
            loss, losses = job.forward(engine, batch)
            kept = watch.live - before
            watch.phase = "backward"
            engine.backward(loss / accumulate)
    gradients = _bytes(p.grad for p in engine.model.parameters() if p.grad is not None)
    watch.phase = "optimizer"
    engine.step(1.0)
    return gradients, kept, losses


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({s._cdata: s.nbytes() for s in (each.untyped_storage() for each in local)}.values())


@contextmanager
def _real_meshes() -> Iterator[None]:
    """Make FSDP's mesh with real tensors inside the block, because the host reads its rank numbers."""
    make = fsdp.init_device_mesh

    def make_real(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return make(*args, **kwargs)

    fsdp.init_device_mesh = make_real  # type: ignore[assignment]
    try:
        yield
    finally:
        fsdp.init_device_mesh = make


class Row(NamedTuple):
    """A figure of the planner and the counted one."""

    what: str
    planned: float
    counted: float
    unit: str = "bytes"

    @property
    def is_right(self) -> bool:
        return abs(self.planned - self.counted) <= TOLERANCE * self.counted

    @property
    def line(self) -> str:
        shown = [
            f"{each / 2**20:,.3f} MiB" if self.unit == "bytes" else f"{each:,.0f} {self.unit}"
            for each in (self.planned, self.counted)
        ]
        ratio = f"{self.planned / self.counted:.3f}" if self.counted else "-"
        return f"  {self.what:<62}{shown[0]:>16}{shown[1]:>16}{ratio:>9}{'' if self.is_right else '  OUT'}"


def compare(counted: Counted, planned: Memory, held: float, sent: Sequence[Traffic]) -> list[Row]:
    """Return the planner's figures for a rank with the counted ones. `held` is the planned memory after a forward."""
    rows = [
        Row("weights", planned.weights, counted.weights),
        Row("gradients, after backward", planned.weights, counted.gradients),
        Row("optimizer", planned.optimizer, counted.optimizer),
        Row("kept by a forward, and gathered", held, counted.kept),
        Row("peak", planned.total, counted.peak),
    ]
    found: dict[tuple[str, str, int], list[float]] = {}
    for each in counted.collectives:
        calls_and_bytes = found.setdefault((each.phase, each.kind, each.ranks), [0, 0.0])
        calls_and_bytes[0] += 1
        calls_and_bytes[1] += each.sent
    for key in dict.fromkeys([*found, *map(_key, sent)]):
        named = [each for each in sent if _key(each) == key]
        what = " + ".join(each.what for each in named) or "not planned"
        calls, bytes = found.get(key, (0, 0.0))
        label = f"{key[0]}, {key[1]} among {key[2]}: {what}"
        rows.append(Row(label, sum(each.bytes for each in named), bytes))
        rows.append(Row("", sum(each.calls for each in named), calls, "calls"))
    return rows


def _key(traffic: Traffic) -> tuple[str, str, int]:
    """Return the key under which a collective is summed."""
    return traffic.phase, traffic.kind, traffic.ranks


def wrong_parts(counted: Counted) -> list[str]:
    """Return the parameters whose rows on this rank are not the expected piece; all pieces make the whole."""
    wrong = []
    for name, part in counted.parts.items():
        rows, row = part.shape[0], part.shape[1:].numel()
        pieces = [piece.numel() for piece in torch.empty(rows, device="meta").chunk(counted.shares)]
        pieces += [0] * (counted.shares - len(pieces))
        first = sum(pieces[: counted.place])
        if (part.start, part.values.numel()) != (first * row, pieces[counted.place] * row) and part.values.numel():
            wrong.append(name)
    return wrong


def schedule(collectives: Sequence[Collective]) -> list[str]:
    """Return the calls in order as text, with one line for a call or for a repeated group of calls."""
    lines: list[str] = []
    calls = [(each.phase, f"{each.kind} among {each.ranks} of {each.bytes / 2**20:,.3f} MiB") for each in collectives]
    place = 0
    while place < len(calls):
        period, times = max(
            ((period, _times(calls[place:], period)) for period in (1, 2, 3, 4)),
            key=lambda found: found[0] * found[1] if found[1] > 1 else 0,
        )
        period = period if times > 1 else 1
        said = ", ".join(call for _, call in calls[place : place + period])
        lines.append(f"  {calls[place][0]:<10} {times:>3} x  {said}")
        place += period * times
    return lines


def _times(calls: Sequence[Any], period: int) -> int:
    """Return the number of consecutive repetitions of the first `period` calls."""
    times = 1
    while calls[times * period : (times + 1) * period] == calls[:period]:
        times += 1
    return times


def report(recipe: Recipe, layout: Layout, gpu: GPU, per_node: int) -> bool:
    """Count a step on the first rank and on the last, whose shares may be smaller, and print both next to the plan.

    Returns True if all figures agree within TOLERANCE. Raises UserError for engines that cannot run this way.
    """
    ranks, engine = layout.ranks, recipe.engine
    if engine.kind != "fsdp" or engine.offload != "none":
        raise UserError(
            f"a dry run needs engine.kind=fsdp and engine.offload=none, not {engine.kind} and {engine.offload}: DDP "
            "and DeepSpeed read the values of tensors"
        )
    count, images = parameters(recipe), recipe.schedule.batch_size // (ranks * recipe.schedule.accumulate)
    planned = memory(recipe, layout, images, count=count, ops="fake")
    held = kept(recipe, images, ranks, "fake") + count.root * FP32
    sent = traffic(recipe, layout, gpu, per_node, count)
    agrees = True
    counted_ranks = dict.fromkeys((0, ranks - 1))
    for rank in track(counted_ranks, "dry run", len(counted_ranks), "ranks"):
        counted = count_step(recipe, ranks, rank)
        rows, wrong = compare(counted, planned, held, sent), wrong_parts(counted)
        mine = sum(part.values.numel() for part in counted.parts.values())
        say(
            f"rank {rank} of {ranks}, micro-batches of {images} images: {mine:,} of {count.total:,} parameters, "
            f"share {counted.place} of {counted.shares}"
        )
        shapes = {str(tuple(each.shape)) for each in counted.losses.columns.values()}
        say(f"losses of shape {', '.join(shapes)}, latents {tuple(counted.losses.latents.shape)}")
        say(f"  {'a step':<62}{'planned':>16}{'counted':>16}{'ratio':>9}")
        say("\n".join(row.line for row in rows))
        if rank == 0:
            say("\n".join(["collectives in their order", *schedule(counted.collectives)]))
        for name in wrong:
            say(f"  OUT: the rank's rows of {name} are not those of its share")
        agrees = agrees and not wrong and all(row.is_right for row in rows)
    say(f"all within {TOLERANCE:.0%}" if agrees else f"OUT: figures that differ by over {TOLERANCE:.0%} are marked")
    return agrees
