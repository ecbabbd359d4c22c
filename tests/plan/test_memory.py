"""Tests of the planned memory against autograd and a real process, and of communication and advice against examples."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from mimae import distributed
from mimae.bench.machine import resident_peak
from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe
from mimae.engines.settings import EngineSettings
from mimae.errors import UserError
from mimae.model.geometry import geometry
from mimae.model.masking import views
from mimae.model.mimae import build
from mimae.objective.costs import FP32, MicroBatch
from mimae.objective.loss import losses
from mimae.objective.terms import TERMS, Term
from mimae.plan import advice, command, communication, cost, memory
from mimae.plan.flops import decoder_flops, encoder_flops
from mimae.plan.gpus import GPUS, find_gpu, peak_flops
from mimae.plan.memory import Layout
from mimae.train.tasks.pretrain import engine_of
from tests.plan.test_plan import SMALL
from tests.rank_processes import run_ranks

EVERY_TERM = [f"objective.{term.weight}=0.5" for term in TERMS if term.weight]


def _tensors() -> list[torch.Tensor]:
    """Return all tensors in Python's memory that have a storage; other tests may leave tensors without one."""
    gc.collect()
    plain = (torch.Tensor, torch.nn.Parameter)
    return [each for each in gc.get_objects() if type(each) in plain and not each.is_meta]


def saved_bytes(recipe: Recipe) -> int:
    """Return the bytes that autograd keeps for a forward, each storage once, without parameters, buffers and inputs.

    The tensors that torch's selective checkpointing keeps are found among Python's objects.
    """
    model, images_count = build(recipe), recipe.schedule.batch_size
    images = torch.zeros(images_count, *recipe.data.size_hw, 3, dtype=torch.uint8)
    visible, targets = views(recipe, 0, 0, torch.arange(images_count))
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), images, visible, targets)}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=False)
    before = {t.untyped_storage().data_ptr() for t in _tensors()}
    with saved_tensors_hooks(pack, lambda tensor: tensor), bf16:
        loss = model(images, visible, targets).loss
    assert loss.requires_grad
    if recipe.model.checkpointing == "selective":
        for tensor in _tensors():
            if (storage := tensor.untyped_storage()).data_ptr() not in before:
                kept[storage.data_ptr()] = storage
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changed",
    [
        pytest.param([], id="self"),
        pytest.param(["decoder.attention=cross", "objective.max_mi=0"], id="cross"),
        pytest.param(["decoder.predict=next_view", "objective.projector=mlp", "model.mlp_width=80"], id="next view"),
        pytest.param(["model.checkpointing=full"], id="checkpointing"),
        pytest.param(["model.checkpointing=selective"], id="selective"),
        pytest.param(["model.checkpointing=selective", "decoder.attention=cross"], id="selective, cross"),
        pytest.param(EVERY_TERM, id="every term"),
    ],
)
def test_activations_are_what_autograd_keeps(precision: str, changed: list[str]) -> None:
    recipe = load_recipe(SMALL, [f"precision={precision}", *changed]).recipe
    planned = memory.kept(recipe, recipe.schedule.batch_size, 1, ops="plain")
    assert planned == pytest.approx(saved_bytes(recipe), rel=0.03)


@pytest.mark.parametrize("changed", ["", "decoder.attention=cross", "model.checkpointing=selective"])
def test_a_stream_in_bf16_keeps_what_is_planned(changed: str) -> None:
    """In bf16 the inputs of all norms of the blocks take half of the bytes; the rest is as before."""
    kept = []
    for residual in ("fp32", "bf16"):
        given = ["precision=bf16", "schedule.batch_size=16", f"model.residual={residual}", *changed.split()]
        recipe = load_recipe(SMALL, given).recipe
        kept.append((memory.kept(recipe, 16, 1, ops="plain"), saved_bytes(recipe)))
    (planned_before, counted_before), (planned, counted) = kept
    assert planned == pytest.approx(counted, rel=0.03)
    # Their difference is exact: no block is concerned.
    assert planned_before - planned == pytest.approx(counted_before - counted, rel=1e-3)


@pytest.mark.parametrize("term", [term for term in TERMS if term.weight], ids=lambda term: term.name)
def test_a_term_keeps_what_it_declares(term: Term) -> None:
    """The latents are left out, because they are made for all terms and for the diagnostics."""
    off = [f"objective.{each.weight}=0" for each in TERMS if each.weight]
    large = ["precision=fp32", "schedule.batch_size=64"]
    without, recipe = (load_recipe(SMALL, [*off, *large, *on]).recipe for on in ([], [f"objective.{term.weight}=0.5"]))
    (loss,) = (each for each in losses(recipe.objective) if each.term is term)
    declared = loss.cost(MicroBatch(geometry(recipe), recipe.model.width, 64, 1, FP32, "plain"))
    more = saved_bytes(recipe) - saved_bytes(without)
    assert declared.kept + declared.kept_early == pytest.approx(more, rel=0.01, abs=2048)


def test_parameters_are_those_of_the_model() -> None:
    recipe = load_recipe(SMALL).recipe
    count, model = memory.parameters(recipe), build(recipe)
    assert count.total == sum(p.numel() for p in model.parameters())
    stages = memory._stages(recipe, 1, 1, "fused")
    assert count.total == count.root + sum(stage.parameters for stage in stages)
    blocks = (*model.encoder.blocks, *model.decoder.blocks)
    assert count.root == count.total - sum(p.numel() for block in blocks for p in block.parameters())


@pytest.mark.parametrize(("name", "millions"), [("vit_giant14", 1011), ("vit_gigantic14", 1843), ("vit_6b14", 5903)])
def test_large_recipes_have_their_size_and_fit_with_their_engine(name: str, millions: int) -> None:
    """The counts are those of timm and of the papers; vit_6b14 has no query and key norms, unlike InternViT."""
    recipe = load_recipe(name).recipe
    count = memory.parameters(recipe)
    assert count.encoder / 1e6 == pytest.approx(millions, abs=6)
    layout = Layout(recipe.engine.kind, 8 * recipe.engine.replicas, recipe.engine.replicas)
    images = recipe.schedule.batch_size // layout.ranks
    budget = cost.USABLE * GPUS["h100"].memory * 2**30
    assert memory.memory(recipe, layout, images, count=count).total <= budget


def test_what_each_engine_spreads() -> None:
    # During the second micro-batch, the gradients of the first are still allocated.
    recipe = load_recipe(SMALL, ["ema.decay=0.9", "schedule.batch_size=6", "schedule.accumulate=2"]).recipe
    count = memory.parameters(recipe)
    whole = 4 * count.total

    def states(*layout: Any) -> list[float]:
        found = memory.memory(recipe, Layout(*layout), 5, count=count)
        return [part / whole for part in (found.weights, found.gradients, found.optimizer)]

    assert states("ddp", 8) == [1, 2, 3]  # theirs, and DDP's buckets; two moments and the average
    assert states("fsdp", 8) == [1 / 8, 1 / 8, 3 / 8]
    assert states("fsdp", 8, 4) == [1 / 2, 1 / 2, 3 / 2]
    assert states("fsdp", 8, 1, "cpu") == [0, 0, 0]
    assert states("zero1", 8) == [9 / 8, 10 / 8, 3 / 8]
    assert states("zero2", 8) == [9 / 8, 2 / 8, 3 / 8]
    assert states("zero3", 8) == [2 / 8, 2 / 8, 3 / 8]


def test_every_engine_is_known_to_the_planner() -> None:
    recipe = load_recipe(SMALL, ["schedule.batch_size=16"]).recipe
    kinds = EngineSettings.model_fields["kind"].annotation
    count, gpu = memory.parameters(recipe), find_gpu("h100")
    assert {layout.kind for layout in cost.layouts(16, 8)} == set(get_args(kinds))
    for layout in cost.layouts(16, 8):
        assert memory.memory(recipe, layout, 1, count=count).total > 0
        assert communication.traffic(recipe, layout, gpu, 8, count)
    unknown = Layout("another", 16)
    with pytest.raises(ValueError, match=r"does not know what engine\.kind=another spreads"):
        memory.memory(recipe, unknown, 1, count=count)
    with pytest.raises(ValueError, match=r"does not know what engine\.kind=another sends"):
        communication.traffic(recipe, unknown, gpu, 8, count)


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    recipe = load_recipe(SMALL).recipe
    count, layout = memory.parameters(recipe), Layout("ddp", 2)
    budget = memory.memory(recipe, layout, 37, count=count).total
    assert memory.largest(recipe, layout, budget, count) == 37
    assert memory.largest(recipe, layout, budget - 1, count) == 36
    assert memory.largest(recipe, layout, count.total, count) == 0


def test_bytes_that_engines_send() -> None:
    recipe = load_recipe(SMALL, ["schedule.batch_size=128", "schedule.accumulate=2"]).recipe
    count, gpu = memory.parameters(recipe), find_gpu("h100")
    n = 4 * count.total

    def sent(*layout: Any) -> dict[str, float]:
        return {each.label: each.bytes for each in communication.traffic(recipe, Layout(*layout), gpu, 8, count)}

    # Two micro-batches of 64 images, 3 views of 48, 64 x 2 moments; 3 x 3 log-sum-exps and positives.
    latents = sent("ddp", 64)["latents, moments, all-gather"]
    assert latents == pytest.approx(63 / 64 * 4 * 2 * (64 * 3 * 48 + 64 * 2 * 48))
    assert sent("ddp", 64)["log-sum-exps, all-gather"] == pytest.approx(63 / 64 * 4 * 2 * 64 * 3 * 3 * 2)
    # V's two sums and CLUB, and four means.
    assert sent("ddp", 64)["sums and losses, all-reduce"] == pytest.approx(2 * 63 / 64 * 4 * 2 * (97 + 4))
    assert sent("ddp", 64)["gradients, all-reduce"] == pytest.approx(2 * n * 63 / 64)  # once for both micro-batches
    assert sent("zero2", 64)["gradients, all-reduce"] == pytest.approx(4 * n * 63 / 64)
    hybrid = sent("fsdp", 64, 8)
    assert hybrid["gradients, reduce-scatter"] == pytest.approx(2 * n * 7 / 8)
    assert hybrid["shares, all-reduce"] == pytest.approx(2 * n / 8 * 7 / 8)
    # ZeRO-3 gathers again what it uses again too late: all but 1.5 of its buckets, which are a block each.
    count = count._replace(total=1_200_000_000, block=100_000_000)
    assert sent("zero3", 64)["weights again, all-gather"] == pytest.approx(2 * 4 * 1.05e9 * 63 / 64)
    assert not sent("ddp", 1)


def test_what_computing_hides() -> None:
    def wait(seconds: float, phase: communication.Phase, beside: bool = True) -> communication.Traffic:
        return communication.Traffic("", "all-gather", 2, 1, 1, seconds, phase, beside)

    recipe = load_recipe(SMALL, ["schedule.batch_size=8", "schedule.accumulate=2"]).recipe
    share = communication.OVERLAP

    def exposed(found: list[communication.Traffic], kind: str) -> float:
        return communication.exposed(found, recipe, Layout(kind, 2), 2, 4)

    given = [wait(5, "forward", beside=False), wait(1, "forward"), wait(10, "backward")]
    assert exposed(given, "fsdp") == pytest.approx(5 + 0 + 10 - 4 * share)
    assert exposed(given, "ddp") == pytest.approx(5 + 0 + 10 - 2 * share)
    beside = [*given, wait(12, "backward")._replace(across=True)]
    assert exposed(beside, "fsdp") == pytest.approx(5 + 0 + 12 - 4 * share)
    # Latents hide behind the decoder alone, and weights behind the whole of forward.
    decoder = 2 * decoder_flops(recipe) / (decoder_flops(recipe) + encoder_flops(recipe))
    latents = wait(1.5, "forward")._replace(what=communication.LATENTS)
    assert exposed([latents], "fsdp") == pytest.approx(1.5 - share * decoder)
    weights = wait(share * (2 - decoder), "forward")
    assert exposed([latents, weights], "fsdp") == pytest.approx(1.5 - share * decoder)


def test_nodes_share_their_network() -> None:
    gpu, share = find_gpu("h100"), communication.LINKS * 1e9
    assert communication._bus(gpu, 8, 8, 1) == 450 * share
    assert communication._bus(gpu, 64, 8, 1) == 400 * share  # eight cards of 50 carry one ring each
    assert communication._bus(gpu, 64, 8, 8) == 50 * share


def test_advice_takes_the_simplest_that_is_as_fast_and_fits() -> None:
    fleet = cost.Fleet(find_gpu("h100"), 64, 8, 0.45)

    def take(name: str, fleet: cost.Fleet, *overrides: str) -> str:
        recipe = load_recipe(name, overrides).recipe
        return advice.advise(recipe, fleet, memory.parameters(recipe))[1]

    assert take("vit_base_400ep", fleet).startswith("take engine.kind=ddp,")
    assert "engine.kind=fsdp" in take("vit_6b14", fleet) and "ddp needs" in take("vit_6b14", fleet)
    small = fleet._replace(gpu=find_gpu("a10"), gpus=8)
    said = take("vit_large_400ep", small)
    assert "model.checkpointing=full" in said and "schedule.accumulate" not in said
    # One GPU holds 6 B parameters on the host, and a block at a time.
    assert "engine.offload=cpu schedule.accumulate=16," in take("vit_6b14", small._replace(gpus=1, per_node=1))
    tiny = fleet.gpu._replace(memory=2)
    assert take("vit_6b14", fleet._replace(gpu=tiny)).startswith("no engine fits")


def test_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    command.plan("vit_huge14", gpus=64, gpu="H100", nodes_of=8, share=0.5, images=10_240)
    said = capsys.readouterr().out
    for part in ("fsdp replicas=8", "GB sent", "images/s", "50% of the peak", "4,000 steps", "take engine.kind=ddp,"):
        assert part in said


@pytest.mark.parametrize(
    ("overrides", "options", "told"),
    [
        ([], {"gpu": "h1000"}, "legal is gb200, b200"),
        ([], {"gpu": "v100"}, "legal is precision=fp32"),
        (["schedule.batch_size=100"], {"gpus": 64}, "must be divisible by 64 .*; the nearest is 128"),
    ],
)
def test_mistakes_are_told(overrides: list[str], options: dict[str, Any], told: str) -> None:
    defaults: dict[str, Any] = {"gpus": 8, "gpu": "h100", "nodes_of": 8, "share": 0.45, "images": 10_240}
    with pytest.raises(UserError, match=told):
        command.plan("vit_base_400ep", overrides, **(defaults | options))


def test_every_gpu_has_a_peak() -> None:
    for gpu in GPUS.values():
        assert peak_flops(gpu.name, "fp32"), gpu.name


MEASURED = {
    "plain": ["schedule.batch_size=16"],
    "checkpointing, average": ["schedule.batch_size=24", "model.checkpointing=full", "ema.decay=0.99"],
    "bf16": ["schedule.batch_size=24", "precision=bf16"],
    "fsdp": ["schedule.batch_size=12", "engine.kind=fsdp", "model.width=256"],
}


def sized(overrides: list[str]) -> Recipe:
    base = ["precision=fp32", "data.image_size=128", "model.size=tiny", "model.heads=4", "objective.projector=mlp"]
    decoder = ["decoder.width=128", "decoder.depth=4", "decoder.heads=4"]
    return load_recipe({}, ["compile=off", *base, *decoder, *overrides]).recipe


def peak_growth(overrides: list[str]) -> int:
    """Return the growth in bytes of this process's peak resident memory by two steps of the given recipe.

    The steps have two micro-batches. Before them a small model is trained.
    """

    def train(recipe: Recipe, steps: int) -> None:
        device, count = distributed.setup(), recipe.schedule.batch_size
        engine = engine_of(recipe, device)
        for _ in range(steps):
            for is_last in (False, True):  # with the gradients of the first micro-batch there in the second
                images = torch.zeros(count, *recipe.data.size_hw, 3, dtype=torch.uint8)
                visible, targets = views(recipe, 0, 0, torch.arange(count))
                with engine.accumulate(is_last):
                    engine.backward(engine.forward(images, visible, targets).loss)
            engine.step(1.0)

    train(sized([*overrides, "schedule.batch_size=2", "model.depth=1", "decoder.depth=1"]), 1)
    gc.collect()
    grown = resident_peak(lambda: train(sized(overrides), 2))
    assert grown is not None
    return grown


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize("overrides", MEASURED.values(), ids=MEASURED)
def test_a_step_takes_the_memory_that_is_planned(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Freed memory is returned at once, so the process is as large as its tensors.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    recipe = sized([*overrides, "schedule.accumulate=2"])
    (measured,) = run_ranks(1, tmp_path, peak_growth, overrides, fresh=True)
    layout = Layout(recipe.engine.kind, 1)
    images, count = recipe.schedule.batch_size, memory.parameters(recipe)
    planned = memory.memory(recipe, layout, images, count=count, ops="plain").total
    print(f"measured {measured / 1e6:.1f} MB, planned {planned / 1e6:.1f} MB: {planned / measured:.3f}")
    assert planned == pytest.approx(measured, rel=0.1)
