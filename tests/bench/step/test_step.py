"""Tests that the step benchmark is fair: the other implementations compute the same as this system."""

from __future__ import annotations

import io
import json
import statistics
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from mimae.bench.baselines import peers
from mimae.bench.baselines.eager import EagerMIMAE
from mimae.bench.baselines.peers import LightlyMAE, noise_of
from mimae.bench.step import command, contest, memory, meters, roof, table
from mimae.bench.step.contenders import ATTENTION, ON_CPU, Baseline, Contender, Ours, batch_of, with_attention
from mimae.bench.step.version import Version
from mimae.cli import app
from mimae.config.load import load_recipe
from mimae.config.recipe import Recipe
from mimae.errors import UserError
from mimae.model import attention_choice
from mimae.model.mimae import MIMAE, build
from mimae.plan import memory as planned
from mimae.plan.flops import decoder_flops, encoder_flops, step_flops

# All numbers differ, so that a swap fails the tests.
SMALL = [
    "data.image_size=[16,24]",
    "model.patch_size=4",
    "model.width=24",
    "model.depth=2",
    "model.heads=3",
    "decoder.width=16",
    "decoder.depth=1",
    "decoder.heads=2",
    "objective.posterior_width=10",
    "schedule.batch_size=5",
    "precision=fp32",
]
NO_MI = ["objective.max_mi=0", "objective.min_mi=0"]
CPU = torch.device("cpu")


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe({}, [*SMALL, *overrides]).recipe


def models(recipe: Recipe) -> tuple[MIMAE, dict[str, Tensor]]:
    """Return a model in float64 without initial zeros and ones, and its weights."""
    torch.manual_seed(0)
    model = build(recipe)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double(), model.state_dict()


def inputs(recipe: Recipe, model: MIMAE) -> tuple[Tensor, Tensor]:
    """Return uint8 images for this system and the same as floats for the others."""
    images = batch_of(recipe)
    return images, ((images.double() / 255 - model.encoder.mean) / model.encoder.std).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="the method with its defaults"),
        pytest.param(
            ["objective.projector=mlp", "objective.learn_temperature=true", "objective.latent=class_token"],
            id="every part of the objective",
        ),
        pytest.param(
            ["masking.num_masks=1", "masking.ratio=0.6", *NO_MI, "objective.normalize_pixels=false"],
            id="one view, raw pixels, no MI",
        ),
    ],
)
def test_eager_computes_the_same(overrides: list[str]) -> None:
    recipe = recipe_of(*overrides)
    ours, state = models(recipe)
    eager = EagerMIMAE(recipe).double()
    eager.load(state)
    images, pixels = inputs(recipe, ours)
    visible, hidden = Ours(recipe, state, images, CPU).draw()

    loss = ours(images, visible, hidden).loss
    expected = eager(pixels, noise_of(visible, ours.encoder.grid.patches))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)

    loss.backward()
    expected.backward()
    trained = {name: p for name, p in eager.named_parameters() if p.requires_grad}
    assert len(trained) == len(list(ours.parameters()))
    norms = sorted(p.grad.norm().item() for p in ours.parameters())
    assert norms == pytest.approx(sorted(p.grad.norm().item() for p in trained.values()), rel=1e-9, abs=1e-13)


def test_lightly_computes_the_same() -> None:
    pytest.importorskip("lightly")
    recipe = recipe_of("masking.num_masks=1", *NO_MI, "data.image_size=16")
    ours, state = models(recipe)
    lightly = LightlyMAE(recipe)
    lightly.load(state)
    images, pixels = inputs(recipe, ours)
    visible, hidden = Ours(recipe, state, images, CPU).draw()
    expected = lightly.double()(pixels, noise_of(visible, ours.encoder.grid.patches))
    # That model computes its sin-cos positions in single precision.
    assert ours(images, visible, hidden).loss.item() == pytest.approx(expected.item(), rel=1e-7)


def test_noise_that_leads_to_given_masks() -> None:
    visible = torch.tensor([[[4, 0], [3, 1]], [[2, 5], [0, 4]]], dtype=torch.int32)
    order = noise_of(visible, 6).argsort(1)
    assert order[:, :4].tolist() == [[4, 0, 3, 1], [2, 5, 0, 4]]


def test_another_computation_is_not_timed() -> None:
    recipe = recipe_of()
    state, images = build(recipe).state_dict(), batch_of(recipe)
    visible, hidden = (ours := Ours(recipe, state, images, CPU)).draw()
    expected, noise = ours.gradient((visible, hidden), "fp32"), noise_of(visible, ours.num_patches)
    same = Baseline("eager", recipe, state, images, CPU).gradient((noise,), "fp32")
    assert contest.check("eager", expected, same, "fp32")["loss"] < 1e-5
    state["decoder.head.bias"] += 0.1
    other = Baseline("eager", recipe, state, images, CPU).gradient((noise,), "fp32")
    with pytest.raises(RuntimeError, match="eager and mimae do not compute the same in fp32: loss"):
        contest.check("eager", expected, other, "fp32")


def test_a_step_trains_every_parameter() -> None:
    recipe = recipe_of()
    state, images = build(recipe).state_dict(), batch_of(recipe)
    for contender in (
        Ours(recipe, state, images, CPU),
        Baseline("eager", recipe, state, images, CPU),
    ):
        trained = [p for p in contender.module.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        contender.step()
        assert all(not torch.equal(p, old) for p, old in zip(trained, before))
        assert all(p.grad is None for p in trained)


@pytest.mark.parametrize(
    ("decoder", "pairs"),
    [
        # 6 of 24 patches are visible. The counts are pairs of tokens in attention, in the last block and before.
        pytest.param([], 18 * 25 + 25 * 25, id="hidden, self"),
        pytest.param(["decoder.predict=next_view"], 6 * 13 + 13 * 13, id="next view"),
        pytest.param(["decoder.attention=cross"], 18 * 7 * 2, id="cross"),
    ],
)
def test_the_layers_of_the_roof_are_those_of_the_cost_model(decoder: list[str], pairs: int) -> None:
    recipe = recipe_of("decoder.depth=2", *decoder)
    layers = sum(2 * p.rows * p.inner * p.columns * p.layers for p in roof.products(recipe))
    attention = 2 * 4 * (1 + 6) ** 2 * 24 + 4 * pairs * 16
    views = 5 * 4
    assert layers == views * (encoder_flops(recipe) + decoder_flops(recipe) - attention)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roof, "SQUARE_SIDE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(roof, "PRODUCT_SECONDS", {"cpu": 1e-4, "cuda": 1e-4})
    monkeypatch.setattr(contest, "ROUND_SECONDS", 1e-4)
    # Run in this process: a fresh one takes seconds to import torch, and test_peak_memory covers it.
    monkeypatch.setattr(
        memory,
        "measure_memory",
        lambda held, *_: [c.update(peak_bytes=None) for _, r in held for c in r["contenders"].values()],
    )


def result_of(file: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Return the output and the JSON of `mimae bench step`."""
    whole = ["bench", "step", "--batch", "3", "--masks", "2", "--rounds", "3", "--out", str(file), *arguments, *SMALL]
    answer = CliRunner().invoke(app, whole, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return answer.output, json.loads(file.read_text())


def test_the_verb_writes_what_it_shows(tmp_path: Path, quick: None) -> None:
    output, result = result_of(tmp_path / "step.json")
    assert "3 images x 2 views, fp32" in output
    assert result["machine"]["cores"] >= 1 and result["versions"]["torch"] == torch.__version__.split("+")[0]
    speed = result["contests"][0]
    assert list(speed["contenders"]) == ["mimae", "eager"]
    assert speed["agreement"]["eager"]["fp32"]["loss"] < 1e-5
    ours, eager = speed["contenders"].values()
    assert len(eager["seconds_per_step"]) == 3
    ratios = [e / o for e, o in zip(eager["seconds_per_step"], ours["seconds_per_step"])]
    assert eager["ours_over_this"] == {"median": sorted(ratios)[1], "min": min(ratios), "max": max(ratios)}
    assert sum(ours["time_by_kind"].values()) == pytest.approx(1)
    assert ours["time_by_kind"]["matmul"] > 0 and ours["time_by_kind"]["optimizer"] > 0


def test_variants_are_compared_with_the_recipe(tmp_path: Path, quick: None) -> None:
    both = "decoder.predict=next_view decoder.attention=cross"
    _, result = result_of(tmp_path / "step.json", "--variant", "decoder.predict=next_view", "--variant", both)
    speed = result["contests"][0]
    assert list(speed["contenders"]) == ["mimae", "decoder.predict=next_view", both]
    assert not speed["agreement"]
    ours, *_, last = (row["seconds_per_step"] for row in speed["contenders"].values())
    shown = io.StringIO()
    table.show(result, Console(file=shown, width=200))
    assert f"{statistics.median(t / o for o, t in zip(ours, last)):.3f} (" in shown.getvalue()
    work = [row["flops_per_step"] for row in speed["contenders"].values()]
    recipes = [
        recipe_of("schedule.batch_size=3", "masking.num_masks=2", *text.split()) for text in ("", *speed["variants"])
    ]
    assert work == [step_flops(recipe) for recipe in recipes]
    assert work[0] > work[1] > work[2]


def test_every_contender_has_the_faster_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("model.attention=auto")
    for fastest in ON_CPU:
        monkeypatch.setattr(attention_choice, "choose", lambda *_, fastest=fastest: (fastest, "measured"))
        assert with_attention(recipe, CPU).model.attention == fastest
        eager = Baseline("eager", recipe, build(recipe).state_dict(), batch_of(recipe), CPU)
        fused = ATTENTION[fastest]
        blocks = [*eager.module.blocks, *eager.module.decoder_blocks]
        monkeypatch.setattr(
            eager, "timed", lambda _, blocks=blocks, fused=fused: 1.0 if blocks[0].attn.fused_attn == fused else 2.0
        )
        assert eager.warm_up() == 1.0 and eager.attention == fastest
        assert {block.attn.fused_attn for block in blocks} == {fused}
    chosen = recipe_of("model.attention=plain")
    assert with_attention(chosen, CPU) is chosen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_counted_memory_is_what_the_planner_counts(checkpointing: str, precision: str) -> None:
    given = [f"precision={precision}", f"model.checkpointing={checkpointing}", "schedule.batch_size=64"]
    recipe = recipe_of(*given, "model.attention=sdpa")
    counted = memory._count(contest.Contest(recipe, [], {}), "mimae", "sdpa")
    assert counted is not None
    assert counted["kept_bytes"] == pytest.approx(planned.kept(recipe, 64, 1, ops="plain"), rel=0.03)
    whole = planned.memory(recipe, planned.Layout("ddp", 1), 64, count=planned.parameters(recipe), ops="plain").total
    assert counted["kept_bytes"] < counted["peak_bytes"] == pytest.approx(whole, rel=0.1)


def test_memory_of_a_model_that_reads_values_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As timm's ViT does while it is built."""
    monkeypatch.setattr(memory, "_contender", lambda *given: torch.linspace(0, 1, 3)[1].item())
    assert memory._count(contest.Contest(recipe_of(), [], {}), "mimae", "sdpa") is None


def test_the_first_step_of_a_turn_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It pays for memory that the contender before has given back."""
    calls: list[int] = []

    def timed(self: Contender, steps: int) -> float:
        calls.append(steps)
        return 9.0 if len(calls) % 2 else 0.5

    monkeypatch.setattr(Contender, "timed", timed)
    monkeypatch.setattr(Contender, "warm_up", lambda self: 1.0)
    monkeypatch.setattr(contest, "ROUND_SECONDS", 3)
    monkeypatch.setattr(contest, "time_by_kind", lambda contender: {})
    found = contest.compete(contest.Contest(recipe_of(*NO_MI), [], {"next_view": recipe_of(*NO_MI)}), 2, CPU)
    assert [row["seconds_per_step"] for row in found["contenders"].values()] == [[0.5, 0.5]] * 2
    assert calls == [1, 3] * 4


class Kept(list[dict[str, Any]]):
    """The result of a contest after each number."""

    def __call__(self, result: dict[str, Any]) -> None:
        self.append(json.loads(json.dumps(result)))


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders take no step: each one is said to take half a second."""
    monkeypatch.setattr(Contender, "timed", lambda self, steps: 0.5)
    monkeypatch.setattr(Contender, "compile_blocks", lambda self: None)
    monkeypatch.setattr(contest, "time_by_kind", lambda contender: {"other": 1.0})


@pytest.mark.usefixtures("instant")
def test_each_number_is_kept_at_once() -> None:
    """The next step may hang: the result has the first step, each warm-up, each round and each profile by then."""
    recipe, kept = recipe_of(*NO_MI, "compile=on"), Kept()
    found = contest.compete(contest.Contest(recipe, [], {"same": recipe}), 2, CPU, kept)
    assert kept[-1] == found
    assert kept[0]["uncompiled_seconds"] == 0.5 and not kept[0]["contenders"]

    def progress(result: dict[str, Any]) -> list[tuple[int, bool]]:
        rows = result["contenders"].values()
        return [(len(row["seconds_per_step"]), row["time_by_kind"] is not None) for row in rows]

    first = (0, False)
    both = [[(1, False)] * 2, [(2, False)] * 2, [(2, True), (2, False)], [(2, True)] * 2]
    assert [progress(each) for each in kept] == [[], [first], [first] * 2, *both]
    assert all(row["images_per_s"] == 10 for each in kept for row in each["contenders"].values())


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("asked for too much\nand more"), "out of memory: asked for too much"),
        (RuntimeError("no kernel"), "RuntimeError: no kernel"),
        (UserError("not installed"), "not installed"),
    ],
)
@pytest.mark.parametrize("when", ["warm_up", "timed", "time_by_kind"])
def test_a_contender_that_fails_costs_its_own_numbers(
    when: str, error: Exception, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, broken = recipe_of(*NO_MI), recipe_of(*NO_MI)
    owner: Any = contest if when == "time_by_kind" else Contender
    works = getattr(owner, when)

    def fails(contender: Contender, *given: Any) -> Any:
        if contender.recipe is broken:
            raise error
        return works(contender, *given)

    monkeypatch.setattr(owner, when, fails)
    found = contest.compete(contest.Contest(recipe, [], {"broken": broken, "last": recipe}), 2, CPU)
    assert found["skipped"] == {"broken": told}
    for name in ("mimae", "last"):
        assert len(found["contenders"][name]["seconds_per_step"]) == 2
        assert found["contenders"][name]["time_by_kind"] == {"other": 1.0}


@pytest.mark.usefixtures("instant")
def test_a_contender_that_fails_leaves_its_memory_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its objects refer to each other, as those of a compiled block may."""
    recipe, broken = recipe_of(*NO_MI), recipe_of(*NO_MI)
    left: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def warm_up(contender: Contender) -> float:
        alive.extend(each() is not None for each in left)
        if contender.recipe is broken:
            left.append(weakref.ref(contender.module))
            contender.module.owner = contender  # type: ignore[assignment]
            raise torch.OutOfMemoryError("too large")
        return 0.5

    monkeypatch.setattr(Contender, "warm_up", warm_up)
    contest.compete(contest.Contest(recipe, [], {"broken": broken, "last": recipe}), 1, CPU)
    assert alive == [False]


@pytest.mark.usefixtures("instant")
def test_the_step_before_compilation_may_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(*NO_MI, "compile=on")
    monkeypatch.setattr(Contender, "warm_up", lambda self: 0.5)
    answers = iter([torch.OutOfMemoryError("CUDA out of memory")])

    def timed(self: Contender, steps: int) -> float:
        for answer in answers:
            raise answer
        return 0.5

    monkeypatch.setattr(Contender, "timed", timed)
    found = contest.compete(contest.Contest(recipe, [], {}), 1, CPU)
    assert "uncompiled_seconds" not in found and len(found["contenders"]["mimae"]["seconds_per_step"]) == 1
    assert found["skipped"] == {"before compilation": "out of memory: CUDA out of memory"}


@pytest.mark.usefixtures("instant")
def test_agreement_is_checked_on_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in fp32 of a whole batch without compilation would not fit into a GPU."""
    sizes: list[int] = []
    works = Contender.gradient

    def gradient(self: Contender, *given: Any) -> Any:
        sizes.append(len(self.images))
        return works(self, *given)

    monkeypatch.setattr(Contender, "gradient", gradient)
    recipe = recipe_of("schedule.batch_size=11", "precision=bf16")
    found = contest.compete(contest.Contest(recipe, ["eager"], {}), 1, CPU)
    assert sizes == [8] * 4 and found["images"] == 11
    assert found["agreement"]["eager"]["fp32"]["loss"] < 1e-5


def test_a_variant_that_this_machine_cannot_run_is_left_out(tmp_path: Path, quick: None) -> None:
    output, result = result_of(tmp_path / "step.json", "--variant", "model.attention=cudnn")
    speed = result["contests"][0]
    assert list(speed["contenders"]) == ["mimae"] and "cudnn" in speed["skipped"]["model.attention=cudnn"]
    assert "model.attention=cudnn left out" in output


def test_a_timed_stage_may_leave_out_memory_and_roof(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "measure_memory", None)
    monkeypatch.setattr(roof, "roof", None)
    output, result = result_of(tmp_path / "step.json", "--no-memory", "--no-roof", "--baseline", "eager")
    assert result["roof"] == {} and "counted" not in result["contests"][0]["contenders"]["mimae"]
    assert "3 images x 2 views, fp32" in output and "memory, 3 images" not in output


def test_a_peak_that_cannot_be_measured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(contest: Any, name: str, *given: Any) -> int:
        if name == "mimae":
            raise RuntimeError("cuDNN has no kernel for this\nand more")
        return 7

    monkeypatch.setattr(memory, "_peak", peak)
    rows: dict[str, Any] = {name: {"attention": "cudnn"} for name in ("mimae", "eager")}
    written: list[str] = []
    held = [(contest.Contest(recipe_of(), ["eager"], {}), {"contenders": rows})]
    memory.measure_memory(held, CPU, lambda: written.append(json.dumps(rows)))
    assert rows["mimae"] | {"attention": ""} == {
        "attention": "",
        "peak_bytes": None,
        "peak_skipped": "RuntimeError: cuDNN has no kernel for this",
    }
    assert rows["eager"]["peak_bytes"] == 7 and len(written) == 2


def test_memory_with_attention_of_a_gpu_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted on the CPU, for which cuDNN has no attention. What cannot be counted costs its row only."""
    counted = [
        memory._count(contest.Contest(recipe_of("precision=bf16", f"model.attention={name}"), [], {}), "mimae", name)
        for name in ("sdpa", "cudnn")
    ]
    assert counted[0] is not None and counted[0] == counted[1]

    def count(contest: Any, name: str, *given: Any) -> dict[str, int]:
        if name == "mimae":
            raise RuntimeError("no fake form")
        return {"kept_bytes": 1, "peak_bytes": 2}

    monkeypatch.setattr(memory, "_count", count)
    rows: dict[str, Any] = {name: {"attention": "sdpa"} for name in ("mimae", "eager")}
    memory.count_memory([(contest.Contest(recipe_of(), ["eager"], {}), {"contenders": rows, "compiled_blocks": False})])
    assert (
        rows["mimae"]["counted_skipped"] == "RuntimeError: no fake form" and rows["eager"]["counted"]["peak_bytes"] == 2
    )


def test_peaks_are_measured_without_rounds_if_asked_for(tmp_path: Path, quick: None) -> None:
    _, result = result_of(tmp_path / "step.json", "--rounds", "0", "--memory", "--variant", "model.checkpointing=full")
    rows = result["contests"][0]["contenders"].values()
    assert all("peak_bytes" in row and row["counted"]["kept_bytes"] > 0 for row in rows)


def test_heads_of_the_small_step_suit_every_attention() -> None:
    """cuDNN has kernels only for heads whose width is a multiple of eight."""
    small = memory._miniature(recipe_of())
    for part in (small.model, small.decoder):
        assert part.width // part.heads % 8 == 0


def test_without_rounds_only_memory_is_counted(tmp_path: Path) -> None:
    given = ["--rounds", "0", "--baseline", "eager", "--baseline", "compiled", "--variant", "model.checkpointing=full"]
    output, result = result_of(tmp_path / "step.json", *given)
    rows = result["contests"][0]["contenders"]
    kept = {name: row["counted"] and row["counted"]["kept_bytes"] for name, row in rows.items()}
    assert kept["compiled"] is None and kept["model.checkpointing=full"] < kept["mimae"] < kept["eager"]
    assert "memory, 3 images x 2 views, fp32" in output and "what the time" not in output


def test_one_thread_is_measured_in_seconds_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert meters.clock()[0] == "processor" and meters.timed(lambda: time.sleep(0.05), 1) < 0.04
        torch.set_num_threads(2)
        assert meters.clock()[0] == "wall" and meters.timed(lambda: time.sleep(0.01), 2) >= 0.01
    finally:
        torch.set_num_threads(threads)


def test_unknown_contenders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--baseline lazy: legal is eager or compiled"):
        command.step(SMALL, baseline=["lazy"])
    with pytest.raises(UserError, match=r"has no mimae/__init__\.py; legal is a checkout"):
        Version(tmp_path, None, SMALL, CPU)


@pytest.mark.slow  # starts two processes
def test_another_version_takes_turns(tmp_path: Path, quick: None) -> None:
    """The other version is this one, so that both allocate the same."""
    root = Path(__file__).parents[3]
    _, result = result_of(tmp_path / "step.json", "--against", str(root))
    ours, other = result["contests"][0]["contenders"].values()
    assert len(other["seconds_per_step"]) == 3 and min(other["seconds_per_step"]) > 0
    assert other["counted"] == ours["counted"]
    assert other["time_by_kind"].keys() == ours["time_by_kind"].keys()


def test_what_has_no_baseline_is_told() -> None:
    with pytest.raises(UserError, match="only has orthogonal masks"):
        command.step([*SMALL, "masking.kind=independent"])
    with pytest.raises(UserError, match="are next_view and self; --variant"):
        command.step([*SMALL, "decoder.predict=next_view"])


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(peers, "import_module", absent)
    with pytest.raises(UserError, match=r"pip install lightly.*--peers"):
        LightlyMAE(recipe_of("data.image_size=16"))


@pytest.mark.slow
def test_peak_memory() -> None:
    """Measure weights, gradients, two moments, and activations that grow with the batch, each in a fresh process."""
    wide = ["model.width=192", "model.depth=4", "decoder.width=96", "model.patch_size=2"]
    results = []
    for batch in (2, 32):
        recipe = recipe_of(*wide, f"schedule.batch_size={batch}")
        result: dict = {"contenders": {"mimae": {"attention": "sdpa"}}}
        memory.measure_memory([(contest.Contest(recipe, [], {}), result)], CPU)
        results.append(result["contenders"]["mimae"]["peak_bytes"])
    state_bytes = 4 * 4 * sum(p.numel() for p in build(recipe).parameters())
    assert state_bytes < results[0] < results[1] < 2**30
