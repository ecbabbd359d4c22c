"""Tests of every engine against one process: losses, reduced gradients, weights, averages, evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partialmethod
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mimae import distributed
from mimae.checkpoints import dcp
from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe
from mimae.engines import fsdp, zero
from mimae.engines.base import Engine
from mimae.engines.ddp import DDPEngine
from mimae.engines.make import check_machine, setup_of
from mimae.engines.zero import ZeroEngine
from mimae.errors import ConfigError, UserError
from mimae.model.masking import views
from mimae.objective import infonce
from mimae.objective.infonce import InfoNCE
from mimae.objective.objective import Losses
from mimae.optim import adamw
from mimae.train.tasks.pretrain import engine_of
from tests.rank_processes import run_ranks

STEPS = 20
BATCH, ACCUMULATE = 24, 2  # Micro-batches of 12 images, so that each of 2 or 4 ranks has more than one image.
GRADIENT = 1e-5  # Relative to each tensor's norm, in fp32: the order of sums differs.
WEIGHTS = 5e-5  # Relative to each tensor's norm: AdamW's steps have equal size also for tiny gradients, 20 times.


def recipe(*overrides: str) -> Recipe:
    """Return a recipe with everything that an engine could break.

    It has V, a gate that opens at step 1, a learned temperature, the projector, accumulation, an average, and a
    clipping norm that both clipped groups exceed at first. No size is divisible by both 2 and 3: width 20, 5 hidden
    units of V, 1 temperature.
    """
    tree = {
        "precision": "fp32",
        "data": {"image_size": [8, 12]},
        "masking": {"num_masks": 3, "ratio": 2 / 3},
        "model": {"patch_size": 4, "width": 20, "depth": 2, "heads": 2},
        "decoder": {"width": 8, "depth": 2, "heads": 2},
        "objective": {
            "max_mi": 0.3,
            "min_mi": 0.7,
            "temperature": 0.2,
            "learn_temperature": True,
            "projector": "mlp",
            "posterior_width": 5,
            "gate_loss": 5.0,
        },
        "optimizer": {"learning_rate": 0.02, "clip": 0.1},
        "schedule": {"batch_size": BATCH, "accumulate": ACCUMULATE, "epochs": 1, "warmup_epochs": 0},
        "ema": {"decay": 0.8},
    }
    return load_recipe(tree, overrides).recipe


def micro_batches(settings: Recipe, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's share of the micro-batches of a step. Global batches do not depend on the number of ranks."""
    images = torch.randint(0, 256, (BATCH, 8, 12, 3), generator=torch.Generator().manual_seed(step), dtype=torch.uint8)
    ids = torch.arange(BATCH) + BATCH * step
    for part in torch.arange(BATCH).chunk(ACCUMULATE):
        mine = part.chunk(distributed.world_size())[distributed.rank()]
        yield images[mine], *views(settings, 0, 0, ids[mine])


def backward(engine: Engine, settings: Recipe, step: int, scale: float = 1.0) -> Losses:
    for i, batch in enumerate(micro_batches(settings, step)):
        with engine.accumulate(is_last=i == ACCUMULATE - 1):
            losses = engine.forward(*batch)
            engine.backward(scale * losses.loss / ACCUMULATE)
    return losses


def gradients(engine: Engine) -> dict[str, Tensor]:
    """Return the whole gradients after the reduction."""
    found = {}
    for name, parameter in engine.model.named_parameters():
        grad: Any = parameter.grad
        if isinstance(engine, ZeroEngine):
            grad = import_module("deepspeed.utils").safe_get_full_grad(parameter)
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return found


def train(engine: Engine, settings: Recipe, steps: range) -> tuple[list[float], list[float]]:
    """Take the steps, and return the losses and the norms of the gradient."""
    losses, norms = [], []
    for step in steps:
        out = backward(engine, settings, step)
        result = engine.step(1 - step / STEPS)
        norms.append(result.grad_norm.item())
        engine.model.objective.gate.update(out.columns["rec"], result.skipped)
        losses.append(out.columns["loss"].item())
    return losses, norms


def evaluate(engine: Engine, settings: Recipe) -> list[Tensor]:
    """Return predictions and features of the same images on every rank; without collectives if the engine allows it."""
    images = torch.randint(0, 256, (3, 8, 12, 3), generator=torch.Generator().manual_seed(99), dtype=torch.uint8)
    visible, hidden = views(settings, 0, 0, torch.arange(3))
    if distributed.rank() > 0 and not engine.is_spread:
        return []
    engine.model.eval()
    with torch.no_grad():
        found = [engine.model.predict(images, visible, hidden), engine.model.features(images)]
    engine.model.train()
    return found


@contextmanager
def without_the_factor() -> Iterator[None]:
    """Make the mistake that the comparison has to detect: InfoNCE's gradient without its factor W."""
    whole = InfoNCE.backward
    ranks = distributed.world_size()
    wrong = staticmethod(lambda ctx, grad: whole(ctx, grad / ranks))
    try:
        vars(infonce)["InfoNCE"].backward = wrong
        yield
    finally:
        vars(infonce)["InfoNCE"].backward = staticmethod(whole)


def saved(engine: Engine, kept: Path | None = None) -> dict[str, dict[str, Tensor]]:
    """Return the present state, whole and on the main rank; the gate's average is 0 before the first step.

    The state is written to `kept` if that is given.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = kept or Path(distributed.gather_objects(folder)[0])
        dcp.save(path, engine.state(), distributed.host_group(), None)
        sections = ("model", "optimizer", "ema") if distributed.rank() == 0 else ()
        whole = {section: dcp.load_whole(path, f"{section}.") for section in sections}
    return {section: {n: t.nan_to_num() for n, t in tensors.items()} for section, tensors in whole.items()}


def first_gradients(settings: Recipe) -> dict[str, Tensor]:
    """Return the gradients of the first step with the gate open."""
    engine = engine_of(settings, torch.device("cpu"))
    engine.model.objective.gate.weight.fill_(1.0)
    backward(engine, settings, 0)
    return gradients(engine)


def everything(overrides: list[str]) -> dict[str, Any]:
    """Return everything that is compared, from engines on this rank."""
    settings = recipe(*overrides)
    with without_the_factor():
        found: dict[str, Any] = {"gradients without the factor": first_gradients(settings)}
    found["gradients"] = first_gradients(settings)
    engine = engine_of(settings, torch.device("cpu"))
    found["start"] = saved(engine)
    found["losses"], found["norms"] = train(engine, settings, range(STEPS // 2))
    found["evaluation"] = evaluate(engine, settings)
    for key, values in zip(("losses", "norms"), train(engine, settings, range(STEPS // 2, STEPS)), strict=True):
        found[key] += values
    found["end"] = saved(engine)
    # Only one rank has a gradient that is not finite, but all ranks skip the step.
    backward(engine, settings, STEPS, scale=float("nan") if distributed.rank() == 0 else 1.0)
    found["skipped"] = engine.step(1.0).skipped.item()
    found["after the skipped step"] = saved(engine)
    return found


def every_engine(kinds: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    return {kind: everything(overrides) for kind, overrides in kinds.items()}


KINDS = {
    "fsdp": ["engine.kind=fsdp"],
    "zero2": ["engine.kind=zero2"],
    "zero3": ["engine.kind=zero3"],
}
SLOW_KINDS = {
    "ddp": ["engine.kind=ddp"],
    "zero1": ["engine.kind=zero1"],
    "fsdp, offload": ["engine.kind=fsdp", "engine.offload=cpu"],
    "zero1, offload": ["engine.kind=zero1", "engine.offload=cpu"],
    "zero3, offload": ["engine.kind=zero3", "engine.offload=cpu"],
    "fsdp, checkpointing": ["engine.kind=fsdp", "model.checkpointing=full"],
    "zero3, checkpointing": ["engine.kind=zero3", "model.checkpointing=full"],
    "ddp, packed": ["engine.kind=ddp", "model.attention=plain"],
    "ddp, packed, selective": ["engine.kind=ddp", "model.attention=plain", "model.checkpointing=selective"],
    "fsdp, packed, selective": ["engine.kind=fsdp", "model.attention=plain", "model.checkpointing=selective"],
    "zero3, packed": ["engine.kind=zero3", "model.attention=plain"],
    "ddp, compiled, selective": ["engine.kind=ddp", "compile=on", "model.checkpointing=selective"],
}
FOUR_RANKS = {"fsdp, replicas": ["engine.kind=fsdp", "engine.replicas=2"], "zero3": ["engine.kind=zero3"]}

Results = list[dict[str, dict[str, Any]]]
"""Results by rank and engine. All engines run in the same processes, because starting processes takes longest."""


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    distributed.setup()
    try:
        return everything(["engine.kind=ddp"])
    finally:
        distributed.shutdown()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(2, tmp_path_factory.mktemp("two"), every_engine, KINDS)


@pytest.fixture(scope="module")
def two_slow(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(2, tmp_path_factory.mktemp("two"), every_engine, SLOW_KINDS)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(4, tmp_path_factory.mktemp("four"), every_engine, FOUR_RANKS)


def apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Return the largest relative distance of two tensors of the same name.

    The bias of the keys is left out: softmax does not depend on it, so its gradient is only rounding, which AdamW
    scales up.
    """

    def seen(name: str, tensor: Tensor) -> Tensor:
        return torch.cat(tensor.chunk(3)[::2]) if name.endswith("qkv.bias") and tensor.ndim else tensor

    assert got.keys() == want.keys()
    assert all(got[name].shape == want[name].shape for name in want)
    pairs = [(seen(name, got[name]), seen(name, want[name])) for name in want]
    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)


def compare(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert all(torch.equal(got["start"]["model"][n], w) for n, w in want["start"]["model"].items())
    assert apart(got["gradients"], want["gradients"]) < GRADIENT
    assert apart(got["gradients without the factor"], want["gradients"]) > 100 * GRADIENT
    assert got["norms"] == pytest.approx(want["norms"], rel=WEIGHTS)
    assert got["losses"] == pytest.approx(want["losses"], rel=WEIGHTS)
    for tensor, other in zip(got["evaluation"], want["evaluation"], strict=True):
        assert (tensor - other).norm() / other.norm() < WEIGHTS
    for section in ("model", "optimizer", "ema"):
        assert apart(got["end"][section], want["end"][section]) < WEIGHTS
        assert apart(got["after the skipped step"][section], got["end"][section]) == 0
    assert got["skipped"] == 1


def compare_ranks(found: Results, kind: str, want: dict[str, Any]) -> None:
    compare(found[0][kind], want)
    for rank in found[1:]:
        assert rank[kind]["losses"] == found[0][kind]["losses"]
        assert rank[kind]["skipped"] == 1 and not rank[kind]["end"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one(kind: str, one: dict[str, Any], two: Results) -> None:
    compare_ranks(two, kind, one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_two_ranks_train_as_one_in_every_variant(kind: str, one: dict[str, Any], two_slow: Results) -> None:
    compare_ranks(two_slow, kind, one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOUR_RANKS)
def test_four_ranks_train_as_one(kind: str, one: dict[str, Any], four: Results) -> None:
    compare_ranks(four, kind, one)


def test_the_run_moves_all_that_it_compares(one: dict[str, Any]) -> None:
    """Otherwise the comparison would prove nothing: every weight moves, the gate opens, gradients are clipped."""
    start, end = one["start"]["model"], one["end"]["model"]
    assert [n for n in start if torch.equal(start[n], end[n])] == ["encoder.pos_embed"]
    assert end["objective.gate.weight"] == 1 and start["objective.gate.weight"] == 0
    assert one["norms"][0] > 0.1


def bf16_gradients() -> dict[str, dict[str, Tensor]]:
    kinds = ("ddp", "fsdp", "zero1", "zero2", "zero3")
    return {kind: first_gradients(recipe(f"engine.kind={kind}", "precision=bf16")) for kind in kinds}


@pytest.mark.slow
def test_engines_round_to_bf16_alike(tmp_path: Path, one: dict[str, Any]) -> None:
    """In bf16 a different rounding of one weight would be detected: products differ by 1e-3 or more from fp32."""
    found = run_ranks(2, tmp_path, bf16_gradients)[0]
    for gradient in found.values():
        assert apart(gradient, found["ddp"]) < GRADIENT
        assert apart(gradient, one["gradients"]) > 100 * GRADIENT


def resumed(path: Path) -> list[str]:
    """Return the tensors that differ between an engine after four steps and one that resumes another after two."""
    settings, device = recipe(), torch.device("cpu")
    whole, first, second = (engine_of(settings, device) for _ in range(3))
    train(whole, settings, range(4))
    train(first, settings, range(2))
    dcp.save(path, first.state(), distributed.host_group(), None)
    second.load(path)
    train(second, settings, range(2, 4))
    return [name for name, part in whole.parts.items() if not torch.equal(part.values, second.parts[name].values)]


def test_ddp_rounds_in_its_first_step_as_in_any_other(tmp_path: Path) -> None:
    """A sum over three ranks depends on its order; a sum over two does not."""
    assert run_ranks(3, tmp_path, resumed, tmp_path / "state") == [[], [], []]


def begun_again(folder: Path) -> dict[str, list[list[float]]]:
    """Return the losses of a new engine, and of an engine that loaded its state."""
    found: dict[str, list[list[float]]] = {}
    for kind, overrides in ({"ddp": ["engine.kind=ddp"]} | KINDS).items():
        settings = recipe(*overrides)
        new, other = (engine_of(settings, torch.device("cpu")) for _ in range(2))
        dcp.save(folder / kind, new.state(), distributed.host_group(), None)
        other.load(folder / kind)
        found[kind] = [train(engine, settings, range(2))[0] for engine in (new, other)]
    return found


def test_a_state_from_before_the_first_step_is_taken_over(tmp_path: Path) -> None:
    """A run that stops after a skipped first step saves such a state."""
    for new, other in run_ranks(2, tmp_path, begun_again, tmp_path)[0].values():
        assert new == other


def patience(replicas: int) -> list[float]:
    """Return the timeouts in seconds of the groups of FSDP's mesh, in a run whose timeout is 77 s."""
    vars(distributed)["_timeout"] = lambda: timedelta(seconds=77)
    groups: list[Any] = []
    make = fsdp.init_device_mesh

    def init(*args: Any, **options: Any) -> DeviceMesh:
        mesh = make(*args, **options)
        groups.extend(mesh.get_all_groups())
        return mesh

    vars(fsdp)["init_device_mesh"] = init
    engine_of(recipe("engine.kind=fsdp", f"engine.replicas={replicas}"), torch.device("cpu"))
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@pytest.mark.parametrize("replicas", [1, 2])  # the whole group and a new one; two new ones
def test_fsdp_waits_for_a_rank_as_long_as_the_run(tmp_path: Path, replicas: int) -> None:
    assert run_ranks(2, tmp_path, patience, replicas) == [[77.0, 77.0]] * 2


@pytest.mark.slow
def test_each_block_is_one_graph_under_ddp_and_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside DDP dynamo would split graphs at the ends of buckets; here each parameter is a bucket."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    counts, curves = [], []
    distributed.setup()
    try:
        for kind in ("ddp", "fsdp"):
            torch.compiler.reset()
            graphs.clear()
            settings = recipe(f"engine.kind={kind}", "compile=on")
            engine = engine_of(settings, torch.device("cpu"))
            if kind == "ddp":
                vars(engine.module)["bucket_bytes_cap"] = 1
            curves.append(train(engine, settings, range(2))[0])
            counts.append([len(graph.graph.nodes) for graph in graphs])
    finally:
        distributed.shutdown()
    assert counts[0] == counts[1] and len(counts[0]) == 3
    assert curves[0] == pytest.approx(curves[1], rel=GRADIENT)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["engine.replicas=2"], "replicas is a setting of kind=fsdp"),
        (["engine.offload=cpu"], "offload needs a kind that shards"),
        (["engine.kind=zero2", "engine.offload=nvme", "engine.offload_path=/tmp"], "is a setting of kind=zero3"),
        (["engine.kind=zero3", "engine.offload=nvme"], "offload_path need each other"),
    ],
)
def test_a_setting_of_another_engine_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        recipe(*overrides)


def test_what_an_engine_needs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(settings: Recipe) -> None:
        check_machine(setup_of(settings), torch.device("cpu"), {})

    with pytest.raises(UserError, match=r"engine\.kind=fsdp cannot run .*replicas=2 does not divide the 1 ranks"):
        check(recipe("engine.kind=fsdp", "engine.replicas=2"))
    for wishes, told in (
        (["engine.kind=zero3", "compile=on"], "gathers weights inside the blocks"),
        (["engine.kind=zero1", "optimizer.impl=apex"], "steps only torch's AdamW or its own"),
    ):
        with pytest.raises(UserError, match=told):
            check(recipe(*wishes))
    graphs = setup_of(recipe("compile=graphs"))  # The recipe accumulates gradients.
    with pytest.raises(UserError, match=r"compile=graphs cannot run .*schedule\.accumulate=2; .*compile=on"):
        check_machine(graphs, torch.device("cuda"), {})
    assert DDPEngine.compile_obstacle(graphs._replace(accumulate=1), torch.device("cuda")) is None
    monkeypatch.setattr(adamw, "has_op", lambda _: False)
    in_files = recipe("engine.kind=zero3", "engine.offload=nvme", f"engine.offload_path={tmp_path}")
    with pytest.raises(UserError, match="built without async_io and pin_memory: install libaio-dev"):
        check(in_files)
    with pytest.raises(UserError, match="DS_BUILD_CPU_ADAM=1"):
        check(recipe("engine.kind=zero1", "optimizer.impl=deepspeed"))
    nowhere = recipe("engine.kind=zero3", "engine.offload=nvme", f"engine.offload_path={tmp_path / 'missing'}")
    with pytest.raises(UserError, match="missing is not a folder that can be written to"):
        check(nowhere)
    monkeypatch.setattr(zero, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"engine\.kind=zero2 cannot run .*pip install 'mimae\[deepspeed\]'"):
        check(recipe("engine.kind=zero2"))


def test_an_engine_has_torchs_own_linear_after_zero3_in_one_process(tmp_path: Path) -> None:
    """With DeepSpeed's form, a recomputed product would get its bias twice."""
    assert run_ranks(1, tmp_path, linear_after_zero3)[0]


def linear_after_zero3() -> bool:
    torchs = torch.nn.functional.linear
    engine_of(recipe("engine.kind=zero3"), torch.device("cpu"))
    replaced = torch.nn.functional.linear is not torchs
    engine_of(recipe("engine.kind=ddp", "model.checkpointing=selective"), torch.device("cpu"))
    return replaced and torch.nn.functional.linear is torchs
