"""Speed and memory of a whole training step: this system, its eager baseline, the MAEs that people install; or this
system with one setting and with another.

The contenders run in one process on the same images from the same weights, in turn, round by round, after a
check that they compute the same loss and gradient norm (with other settings they need not, and are not checked).
Each starts from what its own loader would hand it (this system uint8 pixels, the others normalised floats) and
draws its masks itself. Peak memory is measured in a fresh process for each.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mimae.bench.baselines.eager import EagerMIMAE
from mimae.bench.baselines.peers import LightlyMAE, TransformersMAE, noise_of
from mimae.bench.machine import Product, matmul_rate, resident_bytes, synchronize
from mimae.config.recipe import Recipe
from mimae.engines.base import compile_units, will_compile
from mimae.errors import UserError
from mimae.model.geometry import geometry
from mimae.model.groups import groups
from mimae.model.masking import views
from mimae.model.mimae import MIMAE, build
from mimae.optim.optimizer import Optimizer
from mimae.outside.progress import track
from mimae.plan.flops import step_flops
from mimae.randomness import whole_parts

State = Mapping[str, Tensor]
Gradient = dict[str, float]
"""`loss` and `grad_norm` of one batch."""

OURS = "mimae"
BASELINES = {"eager": EagerMIMAE, "transformers": TransformersMAE, "lightly": LightlyMAE}
PEERS = ("transformers", "lightly")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

TOLERANCES = {"fp32": {"loss": 1e-5, "grad_norm": 1e-4}, "bf16": {"loss": 2e-2, "grad_norm": 5e-2}}
"""Largest relative differences from this system with which a contender is timed."""

ROUND_SECONDS = 2.0
"""Approximate seconds of a contender's turn in a round; a turn has at least one step."""

SQUARE_SIDE = {"cpu": 2048, "cuda": 8192}
"""Sides of the square matrices for the matrix rate of a device."""

PRODUCT_SECONDS = 0.1
"""Approximate seconds for which a matrix product is repeated to find its best time; at least twice."""

KINDS = {
    "optimizer": r"adamw|Optimizer|vector_norm|_foreach_norm",
    "attention": r"attention|softmax",
    "matmul": r"::(addmm|mm|bmm|baddbmm|linear|matmul|einsum)$|mkldnn|conv",
    "norm": r"layer_norm",
    "copies": r"copy_|::(clone|cat|stack|gather|scatter|repeat|roll|index|sort|contiguous)|slice_backward",
    "elementwise": r"gelu|::(add|sub|mul|div|exp|pow|neg|r?sqrt|addcmul|sum|mean|var|var_mean|fill|zero)_?$",
}
"""Groups of operators in the profile: the first pattern in an operator's name decides, otherwise `other`."""


class Contender(ABC):
    """An implementation with its optimizer, ready to take training steps on a fixed batch of images."""

    def __init__(self, recipe: Recipe, module: nn.Module, images: Tensor) -> None:
        """Set up the contender. `images` is the module's first argument, on its device."""
        self.recipe, self.module, self.images = recipe, module, images
        self.num_patches = geometry(recipe).grid.patches
        self.compiled = will_compile(recipe.compile, images.device)

    @abstractmethod
    def draw(self) -> tuple[Tensor, ...]:
        """Return new masks, as arguments of the module."""

    def forward(self, masks: Sequence[Tensor], precision: str) -> Tensor:
        """Return the loss."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = self.module(self.images, *masks)
        return output if isinstance(output, Tensor) else output.loss

    @abstractmethod
    def update(self) -> None:
        """Take an optimizer step, and clear the gradients."""

    @abstractmethod
    def compile_blocks(self) -> None:
        """Compile each transformer block."""

    def step(self) -> None:
        """Run a training step without a wait for the device."""
        self.forward(self.draw(), self.recipe.precision).backward()
        self.update()

    def warm_up(self) -> float:
        """Run the first steps, which compile and allocate, and return the approximate seconds of a later step."""
        if self.compiled:
            self.compile_blocks()
            self.timed(3)
        return self.timed(1)

    def timed(self, steps: int) -> float:
        """Return the seconds per step over `steps` steps."""
        synchronize(self.images.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.images.device)
        return (time.perf_counter() - start) / steps

    def gradient(self, masks: Sequence[Tensor], precision: str) -> Gradient:
        """Return loss and gradient norm with the given masks."""
        loss = self.forward(masks, precision)
        loss.backward()
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        values = {"loss": loss.item(), "grad_norm": torch.nn.utils.get_total_norm(grads).item()}
        self.module.zero_grad()
        return values


class Ours(Contender):
    """This system, with the optimizer of its training loop."""

    module: MIMAE

    def __init__(self, recipe: Recipe, state: State, images: Tensor, device: torch.device) -> None:
        module = MIMAE(recipe.data, recipe.masking, recipe.model, recipe.decoder, recipe.objective)
        module.load_state_dict(state)
        super().__init__(recipe, module.to(device), images.to(device))
        self.sample_ids = torch.arange(len(images), device=device)
        self.epoch = 0
        rule = groups(recipe.optimizer, len(images), recipe.masking.num_masks)
        self.optimizer = Optimizer(whole_parts(module), recipe.optimizer, rule, device)

    def draw(self) -> tuple[Tensor, ...]:
        self.epoch += 1
        recipe = self.recipe
        return views(recipe, recipe.seed, self.epoch, self.sample_ids)

    def update(self) -> None:
        self.optimizer.step(1.0)

    def compile_blocks(self) -> None:
        compile_units(self.module, self.recipe.compile, self.images.device)


class Baseline(Contender):
    """Another implementation, with fused AdamW."""

    module: EagerMIMAE | TransformersMAE | LightlyMAE

    def __init__(self, name: str, recipe: Recipe, state: State, images: Tensor, device: torch.device) -> None:
        module: Any = BASELINES[name](recipe)
        module.load(dict(state))
        mean, std = torch.tensor(recipe.data.mean), torch.tensor(recipe.data.std)
        pixels = ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        super().__init__(recipe, module.to(device).train(), pixels.to(device))
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for parameter_name, parameter in module.named_parameters():
            if parameter.requires_grad:
                is_matrix = parameter.ndim > 1 and not re.search("token|posterior", parameter_name)
                (decayed if is_matrix else others).append(parameter)
        settings = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate * len(images) * recipe.masking.num_masks / 256,
            betas=settings.betas,
            fused=True,
        )

    def draw(self) -> tuple[Tensor, ...]:
        return (torch.rand(len(self.images), self.num_patches, device=self.images.device),)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def compile_blocks(self) -> None:
        for block in (*self.module.blocks, *self.module.decoder_blocks):
            # Compile as this system does: torch would treat the decoder's sizes as changed sizes of the encoder.
            block.compile(dynamic=False)


def batch_of(recipe: Recipe) -> Tensor:
    """Return uint8 noise images (B, H, W, 3): the time of a step does not depend on their content."""
    size = (recipe.schedule.batch_size, *recipe.data.size_hw, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def check(name: str, expected: Gradient, found: Gradient, precision: str) -> dict[str, float]:
    """Return the relative differences of a contender from this system. Raises RuntimeError beyond TOLERANCES."""
    errors = {key: abs(found[key] - expected[key]) / abs(expected[key]) for key in expected}
    for key, error in errors.items():
        if not error <= TOLERANCES[precision][key]:
            raise RuntimeError(
                f"{name} and {OURS} do not compute the same in {precision}: "
                f"{key} {found[key]} and {expected[key]}, {error:.1e} apart"
            )
    return errors


class Contest(NamedTuple):
    """The compared contenders: this system on a recipe, `others` on the same, this system on other recipes, by name."""

    recipe: Recipe
    others: Sequence[str]
    variants: Mapping[str, Recipe]

    def contender(self, name: str) -> tuple[str, Recipe]:
        """Return the implementation of a name, and its recipe."""
        return (OURS, self.variants[name]) if name in self.variants else (name, self.recipe)


def compete(contest: Contest, rounds: int, device: torch.device) -> dict[str, Any]:
    """Check, time and profile the contenders.

    A contender that runs out of memory or is not installed is left out, with the reason, unless it is this system on
    the contest's recipe.
    """
    recipe = contest.recipe
    state, images = build(recipe).state_dict(), batch_of(recipe)
    ours = Ours(recipe, state, images, device)
    contenders: dict[str, Contender] = {OURS: ours}
    if contest.others:
        visible, targets = ours.draw()
        noise = noise_of(visible, ours.num_patches)
        expected = {p: ours.gradient((visible, targets), p) for p in dict.fromkeys(["fp32", recipe.precision])}
    slowest = ours.warm_up()
    agreement: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in (*contest.others, *contest.variants):
        try:
            if name in contest.variants:
                variant = contest.variants[name]
                other: Contender = Ours(variant, build(variant).state_dict(), batch_of(variant), device)
            else:
                other = Baseline(name, recipe, state, images, device)
                agreement[name] = {
                    p: check(name, gradient, other.gradient((noise,), p), p) for p, gradient in expected.items()
                }
            slowest = max(slowest, other.warm_up())
            contenders[name] = other
        except torch.OutOfMemoryError as error:
            skipped[name] = f"out of memory: {str(error).splitlines()[0]}"
        except UserError as error:  # The package is not installed.
            skipped[name] = str(error)

    steps = max(1, round(ROUND_SECONDS / slowest))
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in track(range(rounds), "step", rounds, "rounds"):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(contenders[name].timed(steps))
    return {
        "images": len(images),
        "views": recipe.masking.num_masks,
        "precision": recipe.precision,
        "compiled_blocks": ours.compiled,
        "steps_per_round": steps,
        "agreement": agreement,
        "skipped": skipped,
        "variants": list(contest.variants),
        "contenders": {
            name: {
                "images_per_s": len(contenders[name].images) / statistics.median(times),
                "precision": contenders[name].recipe.precision,
                "flops_per_step": step_flops(contenders[name].recipe),
                "seconds_per_step": times,
                # Pair by round, so that a temporary slowdown of the machine affects both.
                "ours_over_this": _spread([t / o for t, o in zip(times, seconds[OURS])]),
                "time_by_kind": time_by_kind(contenders[name]),
            }
            for name, times in seconds.items()
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def time_by_kind(contender: Contender) -> dict[str, float]:
    """Return the shares of one step's operator time by kind (KINDS), on the GPU if there is one."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler complains on stderr without a GPU.
    on_cuda = contender.images.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        contender.timed(1)
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        if event.device_type.name != "CPU":
            continue  # This is a kernel, whose time is included in its operator's.
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
        shares[kind] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: value / total for kind, value in shares.items()}


def peak_memory(name: str, recipe: Recipe, device: torch.device) -> int:
    """Bytes that two training steps of a contender add at most to a process that has imported it.

    Meant for a fresh process: on the CPU it is the peak of resident memory.
    """
    _take_steps(name, _miniature(recipe), device)  # This includes imports, and the memory that libraries keep.
    before = resident_bytes("VmRSS")
    _take_steps(name, recipe, device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM") - before


def _take_steps(name: str, recipe: Recipe, device: torch.device) -> None:
    """Run the first steps of a contender with random weights."""
    module = MIMAE(recipe.data, recipe.masking, recipe.model, recipe.decoder, recipe.objective)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    state, images = module.state_dict(), batch_of(recipe)
    contender: Contender = (
        Ours(recipe, state, images, device) if name == OURS else Baseline(name, recipe, state, images, device)
    )
    del module, state
    contender.warm_up()
    contender.timed(1)


def _miniature(recipe: Recipe) -> Recipe:
    """Return a recipe with the same grid of patches and the same objective, but negligible memory."""
    grid = geometry(recipe).grid
    small = {"width": 8, "depth": 1, "heads": 2}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"image_size": (grid.rows, grid.columns)}),
            "model": recipe.model.model_copy(update={**small, "patch_size": 1}),
            "decoder": recipe.decoder.model_copy(update=small),
            "schedule": recipe.schedule.model_copy(update={"batch_size": 2}),
        }
    )


def measure_memory(held: Sequence[tuple[Contest, dict[str, Any]]], device: torch.device) -> None:
    """Add `peak_bytes` to every contender, each from a separate process; None if that ran out of memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # Free the memory that the contests left in this process.
    for contest, result in held:
        for name, contender in result["contenders"].items():
            contender["peak_bytes"] = None
            with (
                suppress(BrokenProcessPool, torch.OutOfMemoryError),
                ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
            ):
                contender["peak_bytes"] = pool.submit(peak_memory, *contest.contender(name), device).result()


def products(recipe: Recipe) -> list[Product]:
    """Return the linear layers of the encoder and the decoder in one step."""
    model, decoder, sizes = recipe.model, recipe.decoder, geometry(recipe)
    views, values = recipe.schedule.batch_size * sizes.views, sizes.grid.values

    def blocks(tokens: int, width: int, layers: int) -> list[Product]:
        inner_and_columns = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        return [Product(views * tokens, inner, columns, layers) for inner, columns in inner_and_columns]

    def asking(tokens: int, context: int, width: int, layers: int) -> list[Product]:
        keys_and_values = Product(views * context, width, 2 * width, layers)
        shapes = [(width, width), (width, width), (width, 4 * width), (4 * width, width)]
        return [keys_and_values, *(Product(views * tokens, inner, columns, layers) for inner, columns in shapes)]

    shown, wanted = 1 + sizes.visible, sizes.targets
    decode = (
        asking(wanted, shown, decoder.width, decoder.depth)
        if decoder.attention == "cross"
        else [
            *blocks(shown + wanted, decoder.width, decoder.depth - 1),
            *asking(wanted, shown + wanted, decoder.width, 1),
        ]
    )
    return [
        Product(views * sizes.visible, values, model.width),
        *blocks(shown, model.width, model.depth),
        Product(views * shown, model.width, decoder.width),
        *decode,
        Product(views * wanted, decoder.width, values),
    ]


def roof(recipe: Recipe, device: torch.device) -> dict[str, dict[str, float]]:
    """Return measured matrix rates in FLOP/s by precision: of large square matrices and of the model's layers."""
    side = SQUARE_SIDE[device.type]
    return {
        precision: {
            "square": matmul_rate([Product(side, side, side)], dtype, device, PRODUCT_SECONDS),
            "layers": matmul_rate(products(recipe), dtype, device, PRODUCT_SECONDS),
        }
        for precision, dtype in DTYPES.items()
    }


def check_baselines(recipe: Recipe) -> None:
    """Raise UserError for a method that the other implementations lack."""
    masking, decoder = recipe.masking, recipe.decoder
    if masking.kind != "orthogonal" and masking.num_masks > 1:
        raise UserError(f"the eager baseline only has orthogonal masks, and masking.kind is {masking.kind}")
    if (decoder.predict, decoder.attention) != ("hidden", "self"):
        raise UserError(
            "the baselines predict the hidden patches with self attention: decoder.predict and decoder.attention are "
            f"{decoder.predict} and {decoder.attention}; --variant compares this system with itself"
        )


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print a result as tables."""
    machine = result["machine"]
    console.print(
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {result['versions']['torch']}, {result['date']}"
    )
    for precision, rates in result["roof"].items():
        square, layers = rates["square"] / 1e12, rates["layers"] / 1e12
        console.print(
            f"{precision} matrix products: {square:.3g} TFLOP/s large and square, {layers:.3g} as in the model"
        )
    for contest in result["contests"]:
        rows = contest["contenders"]
        variants = contest["variants"]
        speed = Table(title=f"{contest['images']} images x {contest['views']} views, {contest['precision']}")
        faster = "faster than mimae by (min .. max)" if variants else "mimae is faster by (min .. max)"
        for column in ("", "images/s", faster, "TFLOP a step", "of the roof", "peak memory"):
            speed.add_column(column, justify="right" if column else "left", overflow="fold")
        for name, row in rows.items():
            ratio, peak, flops = row["ours_over_this"], row["peak_bytes"], row["flops_per_step"]
            low, middle, high = ratio["min"], ratio["median"], ratio["max"]
            if variants:
                low, middle, high = 1 / high, 1 / middle, 1 / low
            seconds, limit = statistics.median(row["seconds_per_step"]), result["roof"][row["precision"]]["layers"]
            speed.add_row(
                name,
                f"{row['images_per_s']:.3g}",
                "" if name == OURS else f"{middle:.3f} ({low:.3f} .. {high:.3f})",
                f"{flops / 1e12:.3g}",
                f"{flops / seconds / limit:.0%}",
                "out of memory" if peak is None else f"{peak / 2**20:,.0f} MiB",
            )
        console.print(speed)
        for name, reason in contest["skipped"].items():
            console.print(f"{name} left out: {reason}")
        kinds = Table(title="what the time of a step goes to")
        for column in ("", *KINDS, "other"):
            kinds.add_column(column, justify="right" if column else "left", overflow="fold")
        for name, row in rows.items():
            kinds.add_row(name, *(f"{share:.1%}" for share in row["time_by_kind"].values()))
        console.print(kinds)
