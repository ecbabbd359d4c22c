"""GPU memory in bytes that a training step needs, by engine (docs/scaling.md).

Activations are the tensors that autograd keeps for each op of a forward that runs op by op. A compiled block recomputes
its element-wise ops and keeps less. Letters: S sequences (images x views), T tokens, M tokens for which outputs are
computed, D width, e bytes of a number in the precision of the products, r bytes of a number in the residual stream,
4 bytes of a number in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mimae.engines.zero import LIVE, bucket
from mimae.model.geometry import geometry
from mimae.model.mimae import outline
from mimae.objective.costs import FP32, MicroBatch, Ops
from mimae.objective.loss import losses

if TYPE_CHECKING:
    from mimae.config.recipe import Recipe


class Layout(NamedTuple):
    """An engine on a number of ranks; fields as in EngineSettings."""

    kind: str
    ranks: int
    replicas: int = 1
    offload: str = "none"

    @property
    def shards(self) -> int:
        """Number of ranks that share one copy of the spread tensors."""
        return self.ranks // self.replicas

    @property
    def settings(self) -> str:
        """Return the layout as overrides of a recipe."""
        said = [f"engine.kind={self.kind}"]
        said += [f"engine.replicas={self.replicas}"] if self.replicas > 1 else []
        said += [f"engine.offload={self.offload}"] if self.offload != "none" else []
        return " ".join(said)


class Parameters(NamedTuple):
    """Exact parameter counts, from the model on the meta device."""

    total: int
    encoder: int
    root: int
    """Parameters outside all blocks, which `fsdp` gathers as one unit."""
    block: int
    """Parameters of the largest block."""


class Stage(NamedTuple):
    """A part of forward; sizes are bytes on a rank."""

    kept: float
    """Bytes that autograd keeps until its backward."""
    work: float
    """Bytes in addition to the kept ones, at the peak of its backward, or of its forward if that is more."""
    parameters: int = 0
    """Number of parameters of its block, which `fsdp` gathers for it."""
    products: float = 0.0
    """Bytes of what is kept that are results of products and attention."""


class Memory(NamedTuple):
    """Memory of a GPU at the peak of a step, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    losses: float
    workspace: float

    @property
    def total(self) -> float:
        return sum(self)


def parameters(recipe: Recipe) -> Parameters:
    """Return the parameter counts of a recipe's model."""
    model = outline(recipe)
    parts = (model, model.encoder, model.encoder.blocks, model.decoder.blocks)
    total, encoder, *blocks = (sum(p.numel() for p in part.parameters()) for part in parts)
    largest = max(sum(p.numel() for p in block.parameters()) for part in parts[2:] for block in part)
    return Parameters(total, encoder, total - sum(blocks), largest)


def memory(recipe: Recipe, layout: Layout, images: int, *, count: Parameters, ops: Ops = "fused") -> Memory:
    """Return the memory at the peak of a step with micro-batches of `images` on each rank."""
    weights, gradients, optimizer, buffers = _states(recipe, layout, count)
    stages = _stages(recipe, images, layout.ranks, ops)
    height, width = recipe.data.size_hw
    sizes = geometry(recipe)
    batch = 2 * images * height * width * 3 + 4 * images * sizes.views * sizes.grid.patches
    # The moving average allocates its differences when the activations are freed.
    average = _part(layout, count) * FP32 if recipe.ema.decay and layout.offload == "none" else 0.0
    peak = Memory(weights, gradients, optimizer, 0.0, 0.0, average + batch)
    held, made = sum(stage.kept for stage in stages), 0.0
    for place in reversed(range(len(stages))):
        stage, of_losses = stages[place], stages[-1].kept if place == len(stages) - 1 else 0.0
        there, work = gradients, stage.work + buffers
        if layout.kind == "fsdp":
            made += stage.parameters * FP32 / layout.shards
            there = min(gradients, made) if recipe.schedule.accumulate == 1 else gradients
            gathered = _gathered(stages, place, count)
            # Temporary memory peaks when a block's backward begins; all of its gradients exist when it ends.
            work = max(work + gathered - stage.parameters * FP32, gathered)
        peak = max(peak, Memory(weights, there, optimizer, held - of_losses, of_losses, work + batch), key=sum)
        held -= stage.kept
    return peak


def _gathered(stages: list[Stage], place: int, count: Parameters) -> float:
    """Return the bytes that are gathered under `fsdp` in a stage's backward.

    They are the parameters outside the blocks with their gradients, those of the block and of the block that is being
    gathered, and the gradients of the block and of the block that is being reduced.
    """
    before, after = (stages[i].parameters if 0 <= i < len(stages) else 0 for i in (place - 1, place + 1))
    return min(2 * count.total, 2 * count.root + 2 * stages[place].parameters + before + after) * FP32


def kept(recipe: Recipe, images: int, ranks: int, ops: Ops = "fused") -> float:
    """Return the bytes that autograd keeps for a whole forward of `images` on each rank."""
    return sum(stage.kept for stage in _stages(recipe, images, ranks, ops))


def largest(recipe: Recipe, layout: Layout, budget: float, count: Parameters) -> int:
    """Return the largest micro-batch of a rank, in images, that fits into `budget` bytes, or 0 if none does."""

    def fits(images: int) -> bool:
        return memory(recipe, layout, images, count=count).total <= budget

    if not fits(1):
        return 0
    above = 2
    while fits(above):
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def _part(layout: Layout, count: Parameters) -> float:
    """Return the number of parameters that a rank steps."""
    return count.total if layout.kind == "ddp" else count.total / layout.shards


def _states(recipe: Recipe, layout: Layout, count: Parameters) -> tuple[float, float, float, float]:
    """Return the bytes of weights, gradients, optimizer and permanent engine buffers on a rank's GPU."""
    whole, part = count.total * FP32, _part(layout, count) * FP32
    on_gpu = layout.offload == "none"
    optimizer = part * (3 if recipe.ema.decay else 2) * on_gpu
    buffer = bucket(count.block) * FP32
    if layout.kind == "ddp":
        # The gradients of earlier micro-batches exist in addition to DDP's buckets.
        return whole, whole * (2 if recipe.schedule.accumulate > 1 else 1), optimizer, 0.0
    if layout.kind == "fsdp":
        return part * on_gpu, part * on_gpu, optimizer, 0.0
    if layout.kind == "zero3":
        # Shares exist twice, for gathering and as partitions for the optimizer; gradients too, as collected and flat.
        live = min(count.total * FP32, LIVE * buffer)
        return part * 2 * on_gpu, part * 2 * on_gpu, optimizer, live + buffer
    if layout.kind not in ("zero1", "zero2"):
        raise ValueError(f"the planner does not know what engine.kind={layout.kind} spreads")
    # The model and this rank's partition of it; the partition's gradient as collected and flat; stage 1: the whole one.
    gradients = (whole if layout.kind == "zero1" else 0.0) + 2 * part * on_gpu
    return whole + part * on_gpu, gradients, optimizer, buffer


def _stages(recipe: Recipe, images: int, ranks: int, ops: Ops) -> list[Stage]:
    """Return the stages of forward in order, with the losses last."""
    model, decoder = recipe.model, recipe.decoder
    sizes, e, casts = geometry(recipe), number_bytes(recipe), _casts(recipe)
    r = 2 if recipe.model.residual == "bf16" else FP32
    S, T, M, values = images * sizes.views, 1 + sizes.visible, sizes.targets, sizes.grid.values
    block = _block(S, e, r, T, T, model.width, model.heads, model.mlp, casts)
    embed = Stage(S * (T - 1) * values * e if ops == "plain" else 0.0, 0.0)
    between = Stage(S * T * ((FP32 + e) * model.width + 8) + casts * model.width * decoder.width, 0.0)
    stages = [embed, *[_held(recipe, block, r * S * T * model.width)] * model.depth, between]
    early, late = _objective(recipe, MicroBatch(sizes, model.width, images, ranks, e, ops))
    return [*stages, early, *_decoder(recipe, S, e, r, T, M, casts), late]


def _decoder(recipe: Recipe, S: int, e: int, r: int, T: int, M: int, casts: int) -> list[Stage]:
    """Return the stages of the decoder: its blocks, and its last norm with the head."""
    D, heads, depth = recipe.decoder.width, recipe.decoder.heads, recipe.decoder.depth
    if recipe.decoder.attention == "cross":
        block = _block(S, e, r, T, M, D, heads, 4 * D, casts, apart=True)
        blocks = [_held(recipe, block, r * S * M * D)] * depth
        # The encoder's tokens count once for all blocks. In fp32 the queries of the first block are a part of a tensor
        # that holds them too.
        copies = 2 if r == FP32 else 1
        blocks[0] = blocks[0]._replace(kept=blocks[0].kept + copies * S * T * D * r)
    else:
        block = _block(S, e, r, T + M, T + M, D, heads, 4 * D, casts)
        last = _block(S, e, r, T + M, M, D, heads, 4 * D, casts, apart=True)
        inputs = r * S * (T + M) * D
        blocks = [_held(recipe, block, inputs)] * (depth - 1) + [_held(recipe, last, inputs)]
    values = geometry(recipe).grid.values
    head = S * M * ((FP32 + e) * D + 8) + casts * D * values
    return [*blocks, Stage(head, 0.0)]


def _block(
    S: int, e: int, r: int, seen: int, answered: int, D: int, heads: int, mlp: int, casts: int, apart: bool = False
) -> Stage:
    """Return the stage of a transformer block without its input.

    It keeps keys and values of the `seen` tokens. For the `answered` tokens it keeps queries, attention's output and
    log-sum-exp, the second norm's input and output, and the MLP before and after GELU. With `apart`, both kinds pass
    through the first norm separately.
    """
    of_seen = 3 * e * D + 8
    of_answered = 2 * e * D + 4 * heads + r * D + e * D + 8 + 2 * e * mlp
    if apart:
        of_answered += e * D
    matrices = 4 * D * D + 2 * D * mlp
    # At the start of the MLP's backward: the gradients of the block's output (and its cast), of GELU's output and of a
    # weight.
    work = S * answered * (r * D + (e * D if r != e else 0) + e * mlp) + (FP32 + casts) * D * mlp
    kept = S * (seen * of_seen + answered * of_answered) + casts * matrices
    # Results of the products but for the MLP's second, and of attention: what `selective` keeps beside the input.
    products = S * (seen * 2 * e * D + answered * (3 * e * D + 4 * heads + e * mlp))
    return Stage(kept, work, matrices + 9 * D + mlp, products)


def _held(recipe: Recipe, block: Stage, inputs: int) -> Stage:
    """Return a block's stage with its input, of `inputs` bytes.

    With checkpointing only the input is kept, or with `selective` the results of products too; the rest is recomputed
    in backward.
    """
    if recipe.model.checkpointing == "none":
        return block._replace(kept=inputs + block.kept)
    products = block.products if recipe.model.checkpointing == "selective" else 0.0
    return block._replace(kept=inputs + products, work=block.kept - products + block.work)


def _objective(recipe: Recipe, batch: MicroBatch) -> tuple[Stage, Stage]:
    """Return the bytes that the terms keep from before the decoder, latents first, and from after it."""
    terms = losses(recipe.objective)
    costs = [each.cost(batch) for each in terms]
    # A latent, its direction, and the tensors that its backward reads.
    shared = 3 * batch.views * batch.width * FP32 if any(each.term.reads_latents for each in terms) else 0
    early = Stage(shared + sum(cost.kept_early for cost in costs), 0.0)
    return early, Stage(sum(cost.kept for cost in costs), sum(cost.work for cost in costs))


def number_bytes(recipe: Recipe) -> int:
    """Return e, the bytes of a number in the precision of the products."""
    return 2 if recipe.precision == "bf16" else FP32


def _casts(recipe: Recipe) -> int:
    """Return the bytes per number of the copy of a weight that autograd keeps: autocast makes one, fp32 needs none."""
    return 2 if recipe.precision == "bf16" else 0
