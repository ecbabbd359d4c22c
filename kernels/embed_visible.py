"""The encoder's input tokens: a matrix product whose left operand is converted from uint8 pixels while it is loaded.

With x' = (x - 128) / 128, which is exact in bf16 and fp16, a normalised pixel is s_c (x' + t_c), where
s_c = 128 / (255 std_c) and t_c = (128 - 255 mean_c) / 128 belong to its channel. So a first pass multiplies the weights
by s_c, in the order of the pixels, and adds sum_f s_c w_f t_c to the bias; the product itself only converts bytes. The
class token is a row without pixels. The weights' gradient is the transposed product, sums over tokens of d_token x', to
which s_c and t_c are applied at the end.

In fp32 the other operand consists of three bf16 numbers that add up to it, one after the other along the sum. Because
x' is exact, this has fp32's accuracy at half the cost of three tf32 products.

Traffic: pixels, ids and tokens pass memory once. These are read again, from the L2 cache: pixels for each tile of
columns, weights for each tile of rows, a position for each token. Tiles of the same rows are neighbours in the grid.
Backward reads d_tokens for each tile of features and pixels for each tile of channels; the tokens are split among
programs, whose sums a second kernel adds in order. At ViT-B in bf16 with 1024 images, unique bytes are 1.003 and 1.06
times the least, issued bytes 4.0 and 3.7 times.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimae.kernels import reference
from mimae.kernels.runtime import Impl, Target, chosen, jit, launch, product_dtype, target_of, tl


def embed_visible(
    images: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls: Tensor,
    mean: Tensor,
    std: Tensor,
    impl: Impl = "auto",
) -> Tensor:
    """Return the encoder's input tokens of every view, from uint8 pixels.

    images (B, H, W, 3) uint8, visible (B, N, K) int32 or int64 ids in [0, L), weight (D, 3, P, P), bias (D,),
    pos (1+L, D), fixed, cls (D,), mean and std (3,) -> tokens (B, N, 1+K, D): class token first, then the patches of
    `visible` in its order. Their dtype is the one to which the product, pos and cls promote. The product runs in the
    dtype of autocast, or the weight's. float64 runs in plain PyTorch.
    Raises ValueError for other shapes, dtypes and devices, for a `pos` that requires grad, and for float64 in triton.
    """
    _check(images, visible, weight, bias, pos, cls, mean, std)
    widest = max((weight, pos, cls), key=lambda each: each.dtype.itemsize)
    if chosen("embed_visible", widest, impl) == "reference":
        return reference.embed_visible(images, visible, weight, bias, pos, cls, mean, std)
    return _embed_visible(images, visible, weight, bias, pos, cls, mean, std, product_dtype(weight))


def _check(
    images: Tensor, visible: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor, mean: Tensor, std: Tensor
) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images are uint8 (B, H, W, 3), not {images.dtype} {tuple(images.shape)}")
    if weight.dim() != 4 or weight.shape[1] != 3 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight is (D, 3, P, P), not {tuple(weight.shape)}")
    (_, H, W, _), (D, _, P, _) = images.shape, weight.shape
    if H % P or W % P:
        raise ValueError(f"images of {H} x {W} pixels do not divide into patches of {P}")
    if visible.dim() != 3 or visible.shape[0] != images.shape[0]:
        raise ValueError(f"with images {tuple(images.shape)} goes visible (B, N, K), not {tuple(visible.shape)}")
    if visible.dtype not in (torch.int32, torch.int64) or visible.device != images.device:
        raise ValueError(f"visible is {visible.dtype} on {visible.device}: legal is int32 or int64 on {images.device}")
    shapes = {"bias": (D,), "pos": (1 + (H // P) * (W // P), D), "cls": (D,), "mean": (3,), "std": (3,)}
    for (name, shape), each in zip(shapes.items(), (bias, pos, cls, mean, std)):
        if each.shape != shape:
            raise ValueError(
                f"with images {tuple(images.shape)} and weight {tuple(weight.shape)} goes {name} {shape}, "
                f"not {tuple(each.shape)}"
            )
    for each in (weight, bias, pos, cls, mean, std):
        if not each.is_floating_point() or each.device != images.device:
            raise ValueError(f"{each.dtype} on {each.device}: legal is floating point on {images.device}")
    if pos.requires_grad:
        raise ValueError("pos requires grad, but positions are fixed: there is no gradient for them")


@torch.library.custom_op("mimae::embed_visible", mutates_args=())
def _embed_visible(
    images: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls: Tensor,
    mean: Tensor,
    std: Tensor,
    product: torch.dtype,
) -> Tensor:
    return launch_forward(images, visible, weight, bias, pos, cls, mean, std, product)


@_embed_visible.register_fake
def _empty_tokens(
    images: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls: Tensor,
    mean: Tensor,
    std: Tensor,
    product: torch.dtype,
) -> Tensor:
    B, N, K = visible.shape
    dtype = torch.promote_types(torch.promote_types(product, pos.dtype), cls.dtype)
    return images.new_empty(B, N, 1 + K, weight.shape[0], dtype=dtype)


@torch.library.custom_op("mimae::embed_visible_backward", mutates_args=())
def _embed_visible_backward(
    d_tokens: Tensor, images: Tensor, visible: Tensor, mean: Tensor, std: Tensor, patch: int, product: torch.dtype
) -> tuple[Tensor, Tensor]:
    return launch_backward(d_tokens, images, visible, mean, std, patch, product)


@_embed_visible_backward.register_fake
def _empty_gradients(d_tokens: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, patch, _ = others
    D = d_tokens.shape[-1]
    d_weight = d_tokens.new_empty(D, 3, patch, patch, dtype=torch.float32)
    return d_weight, d_tokens.new_empty(D, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, visible, weight, bias, _, cls, mean, std, product = inputs
    ctx.save_for_backward(images, visible, mean, std)
    ctx.patch, ctx.product = weight.shape[-1], product
    ctx.dtypes = weight.dtype, bias.dtype, cls.dtype


def _backward(ctx: Any, d_tokens: Tensor) -> tuple[Tensor | None, ...]:
    _, _, of_weight, of_bias, _, of_cls, *_ = ctx.needs_input_grad
    d_weight = d_bias = d_cls = None
    if of_weight or of_bias:
        images, visible, mean, std = ctx.saved_tensors
        d_weight, d_bias = _embed_visible_backward(d_tokens, images, visible, mean, std, ctx.patch, ctx.product)
        d_weight, d_bias = d_weight.to(ctx.dtypes[0]), d_bias.to(ctx.dtypes[1])
    if of_cls:
        # This is one token of 1 + K, so the cost of a separate pass is negligible.
        d_cls = d_tokens[:, :, 0].sum((0, 1), dtype=torch.float32).to(ctx.dtypes[2])
    return None, None, d_weight, d_bias, None, d_cls, None, None, None


_embed_visible.register_autograd(_backward, setup_context=_setup_context)


def launch_forward(
    images: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls: Tensor,
    mean: Tensor,
    std: Tensor,
    product: torch.dtype,
) -> Tensor:
    """Compute the tokens in two launches: one for the weights, one for the tokens. `product`: dtype of the product."""
    tokens = _empty_tokens(images, visible, weight, bias, pos, cls, mean, std, product)
    B, N, T, D = tokens.shape
    P = weight.shape[-1]
    features = 3 * P * P
    tile = _tile(B * N * T, D, features, target_of(images))
    padded = -(-features // tile.step) * tile.step
    held, pieces = _pieces(product)
    scaled = weight.new_empty(D, pieces, padded, dtype=held)
    shift = weight.new_empty(D, dtype=torch.float32)
    launch(
        _scale_weight,
        (D,),
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        mean=mean.contiguous(),
        std=std.contiguous(),
        scaled=scaled,
        shift=shift,
        FEATURES=features,
        PADDED=padded,
        SIZE=_power_of_two(padded),
        PIECES=pieces,
    )
    launch(
        _embed,
        (-(-B * N * T // tile.rows) * -(-D // tile.columns),),
        warps=tile.warps,
        stages=tile.stages,
        images=images.contiguous(),
        visible=visible.contiguous(),
        scaled=scaled,
        shift=shift,
        pos=pos.contiguous(),
        cls=cls.contiguous(),
        tokens=tokens,
        rows=B * N * T,
        width=D,
        VIEWS=N,
        SHOWN=T - 1,
        PATCH=P,
        HEIGHT=images.shape[1],
        WIDTH=images.shape[2],
        PADDED=padded,
        PIECES=pieces,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STEP=tile.step,
    )
    return tokens


def launch_backward(
    d_tokens: Tensor, images: Tensor, visible: Tensor, mean: Tensor, std: Tensor, patch: int, product: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight (D, 3, P, P) and bias (D,) in fp32, in two launches: partial sums, their sum."""
    d_weight, d_bias = _empty_gradients(d_tokens, images, visible, mean, std, patch, product)
    D, features = d_tokens.shape[-1], 3 * patch * patch
    rows = d_tokens.numel() // D
    held, pieces = _pieces(product)
    tile = _gradient_tile(features, target_of(images))
    tiles = -(-D // tile.rows) * -(-features // tile.columns)
    # There are as many parts of the rows as needed to occupy every processor once.
    share = -(-rows // max(1, target_of(images).processors // (tiles * pieces)))
    share = max(1, -(-share // tile.step)) * tile.step
    parts = max(1, -(-rows // share))
    sums = images.new_empty(pieces * parts, D, features, dtype=torch.float32)
    bias_sums = images.new_empty(pieces * parts, D, dtype=torch.float32)
    launch(
        _sum_parts,
        (pieces * parts * tiles,),
        warps=tile.warps,
        stages=tile.stages,
        d_tokens=d_tokens.contiguous(),
        images=images.contiguous(),
        visible=visible.contiguous(),
        sums=sums,
        bias_sums=bias_sums,
        rows=rows,
        share=share,
        parts=parts,
        width=D,
        VIEWS=visible.shape[1],
        SHOWN=visible.shape[2],
        PATCH=patch,
        HEIGHT=images.shape[1],
        WIDTH=images.shape[2],
        HELD=tl.float16 if held == torch.float16 else tl.bfloat16,
        PIECES=pieces,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STEP=tile.step,
    )
    launch(
        _add_parts,
        (D,),
        sums=sums,
        bias_sums=bias_sums,
        mean=mean.contiguous(),
        std=std.contiguous(),
        d_weight=d_weight,
        d_bias=d_bias,
        parts=pieces * parts,
        width=D,
        FEATURES=features,
        SIZE=_power_of_two(features),
    )
    return d_weight, d_bias


class _Tile(NamedTuple):
    rows: int
    columns: int
    """Number of columns. A quarter of it differs from `step`: blocks of equal shape would share one layout, but bytes
    need longer runs than tokens."""
    step: int
    """Number of features in a step of the product."""
    warps: int
    stages: int


def _tile(rows: int, width: int, features: int, target: Target) -> _Tile:
    """Return the tile of the product.

    Features of a row are bytes and those of a column bf16, so a tile twice as high as wide reads the fewest bytes;
    Hopper has enough registers for it. A small problem needs many tiles.
    """
    generations = {9: _Tile(256, 128, 64, 8, 3), 10: _Tile(128, 256, 64, 8, 3)}
    tile = generations.get(target.capability // 10, _Tile(128, 256, 32, 8, 3))
    if -(-rows // tile.rows) * -(-width // tile.columns) < target.processors:
        tile = _Tile(64, 64, 64, 4, 3)
    return tile._replace(step=min(tile.step, max(16, _power_of_two(features))))


def _gradient_tile(features: int, target: Target) -> _Tile:
    """Return the tile of the weights' gradient: rows are output channels, columns are features, steps are tokens."""
    columns = 256 if target.capability // 10 in (9, 10) else 128
    return _Tile(128, min(columns, max(16, _power_of_two(features))), 32, 8, 3)


def _pieces(product: torch.dtype) -> tuple[torch.dtype, int]:
    """Return the type and number of pieces of an operand: three bf16 numbers add up to one fp32 number."""
    return (torch.bfloat16, 3) if product == torch.float32 else (product, 1)


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


@jit
def _scale(std, channel):  # type: ignore[no-untyped-def]
    """Return s_c of the module's docstring."""
    return 128.0 / (255.0 * tl.load(std + channel).to(tl.float32))


@jit
def _offset(mean, channel):  # type: ignore[no-untyped-def]
    """Return t_c of the module's docstring."""
    return (128.0 - 255.0 * tl.load(mean + channel).to(tl.float32)) / 128.0


@jit
def _centred(pixels):  # type: ignore[no-untyped-def]
    """Return x' = (x - 128) / 128.

    The fp32 bits of 65536 + x / 128 end in x. So an OR and a subtraction, at full rate, replace a conversion from
    integer, which runs at a quarter of the rate.
    """
    return (pixels.to(tl.uint32) | 0x47800000).to(tl.float32, bitcast=True) - 65537.0


@jit
def _origin(image, patch, PATCH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the offset of the first pixel of a patch."""
    ACROSS: tl.constexpr = WIDTH // PATCH
    corner = patch // ACROSS * (PATCH * WIDTH * 3) + patch % ACROSS * (PATCH * 3)
    return image.to(tl.int64) * (HEIGHT * WIDTH * 3) + corner


@jit
def _within(feature, PATCH: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the offset of a feature from the first pixel; features are ordered (row, column, channel)."""
    return feature // (3 * PATCH) * (3 * WIDTH) + feature % (3 * PATCH)


@jit
def _quarters(block):  # type: ignore[no-untyped-def]
    """Return a block's columns in four parts. Stored one after the other, they take fewer registers."""
    left, right = block.reshape([block.shape[0], 2, block.shape[1] // 2]).permute([0, 2, 1]).split()
    first, second = left.reshape([block.shape[0], 2, block.shape[1] // 4]).permute([0, 2, 1]).split()
    third, fourth = right.reshape([block.shape[0], 2, block.shape[1] // 4]).permute([0, 2, 1]).split()
    return first, second, third, fourth


@jit
def _scale_weight(  # type: ignore[no-untyped-def]
    weight, bias, mean, std, scaled, shift,
    FEATURES: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Scale the weights of one output channel and split them into pieces; zeros fill the last step of the product."""
    column = tl.program_id(0)
    feature = tl.arange(0, SIZE)
    channel = feature % 3
    source = weight + column * FEATURES + channel * (FEATURES // 3) + feature // 3
    rest = tl.load(source, mask=feature < FEATURES, other=0.0).to(tl.float32) * _scale(std, channel)
    constant = tl.zeros([SIZE], tl.float32)
    for piece in tl.static_range(PIECES):
        part = rest.to(scaled.dtype.element_ty)
        tl.store(scaled + (column * PIECES + piece) * PADDED + feature, part, mask=feature < PADDED)
        rest -= part.to(tl.float32)
        constant += part.to(tl.float32) * _offset(mean, channel)
    tl.store(shift + column, tl.load(bias + column).to(tl.float32) + tl.sum(constant))


@jit
def _embed(  # type: ignore[no-untyped-def]
    images, visible, scaled, shift, pos, cls, tokens, rows, width,
    VIEWS: tl.constexpr, SHOWN: tl.constexpr, PATCH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    first_column = tl.program_id(0) % across * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    sequence = row // (SHOWN + 1)
    # The class token counts as patch -1, whose position is the first.
    is_patch = (row < rows) & (row % (SHOWN + 1) > 0)
    patch = tl.load(visible + row - sequence - 1, mask=is_patch, other=-1).to(tl.int32)
    origin = _origin(sequence // VIEWS, patch, PATCH, HEIGHT, WIDTH)

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, PIECES * PADDED, STEP):
        feature = tl.multiple_of(start % PADDED, STEP) + tl.arange(0, STEP)
        pixels = images + origin[:, None] + _within(feature, PATCH, WIDTH)[None, :]
        pixels = tl.load(pixels, mask=is_patch[:, None] & (feature < 3 * PATCH * PATCH)[None, :], other=0)
        weights = scaled + column[:, None] * (PIECES * PADDED) + (start + tl.arange(0, STEP))[None, :]
        weights = tl.load(weights, mask=(column < width)[:, None], other=0.0)
        total = tl.dot(_centred(pixels).to(weights.dtype), weights.T, total)

    quarters = _quarters(total)
    for quarter in tl.static_range(4):
        column = first_column + quarter * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        of_patch = quarters[quarter] + tl.load(shift + column, mask=column < width, other=0.0)[None, :]
        of_class = tl.load(cls + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
        position = tl.load(pos + (1 + patch)[:, None] * width + column[None, :], mask=inside, other=0.0)
        token = tl.where(is_patch[:, None], of_patch, of_class) + position.to(tl.float32)
        out = tokens + row.to(tl.int64)[:, None] * width + column[None, :]
        tl.store(out, token.to(tokens.dtype.element_ty), mask=inside)


@jit
def _sum_parts(  # type: ignore[no-untyped-def]
    d_tokens, images, visible, sums, bias_sums, rows, share, parts, width,
    VIEWS: tl.constexpr, SHOWN: tl.constexpr, PATCH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    HELD: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Sum d_token x' over `share` rows; the programs of the first features also sum d_token."""
    FEATURES: tl.constexpr = 3 * PATCH * PATCH
    ACROSS: tl.constexpr = (FEATURES + COLUMNS - 1) // COLUMNS
    down = tl.cdiv(width, ROWS)
    first_feature = tl.program_id(0) % ACROSS * COLUMNS
    feature = first_feature + tl.arange(0, COLUMNS)
    channel = tl.program_id(0) // ACROSS % down * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(0) // (ACROSS * down)
    piece = part // parts
    first = part % parts * share
    last = tl.minimum(first + share, rows)

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # A product with ones computes the sums from the same operand, without a reduction across warps.
    ones = tl.full([STEP, 16], 1.0, tl.float32).to(HELD)
    bias_total = tl.zeros([ROWS, 16], tl.float32)
    for start in range(first, last, STEP):
        row = start + tl.arange(0, STEP)
        sequence = row // (SHOWN + 1)
        is_patch = (row < last) & (row % (SHOWN + 1) > 0)
        patch = tl.load(visible + row - sequence - 1, mask=is_patch, other=0).to(tl.int32)
        origin = _origin(sequence // VIEWS, patch, PATCH, HEIGHT, WIDTH)
        pixels = images + origin[:, None] + _within(feature, PATCH, WIDTH)[None, :]
        pixels = tl.load(pixels, mask=is_patch[:, None] & (feature < FEATURES)[None, :], other=0)
        gradient = d_tokens + row.to(tl.int64)[:, None] * width + channel[None, :]
        gradient = tl.load(gradient, mask=(row < last)[:, None] & (channel < width)[None, :], other=0.0)
        # This is not done by the mask of the load: without this separate step the compiler loads 4 bytes at a time, not
        # 16.
        gradient = tl.where(is_patch[:, None], gradient.to(tl.float32), 0.0)
        if PIECES == 3:
            rest = gradient - gradient.to(HELD).to(tl.float32)
            least = rest - rest.to(HELD).to(tl.float32)
            gradient = tl.where(piece == 0, gradient, tl.where(piece == 1, rest, least))
        gradient = gradient.to(HELD).T
        total = tl.dot(gradient, _centred(pixels).to(HELD), total)
        bias_total = tl.dot(gradient, ones, bias_total)

    out = (part * width + channel).to(tl.int64)[:, None]
    quarters = _quarters(total)
    for quarter in tl.static_range(4):
        feature = first_feature + quarter * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        inside = (channel < width)[:, None] & (feature < FEATURES)[None, :]
        tl.store(sums + out * FEATURES + feature[None, :], quarters[quarter], mask=inside)
    if first_feature == 0:
        # All sixteen columns are the same.
        column = tl.arange(0, 16)[None, :]
        tl.store(bias_sums + out + column, bias_total, mask=(channel < width)[:, None] & (column == 0))


@jit
def _add_parts(  # type: ignore[no-untyped-def]
    sums, bias_sums, mean, std, d_weight, d_bias, parts, width, FEATURES: tl.constexpr, SIZE: tl.constexpr
):
    """Add up the weight gradients of one output channel, and its bias gradient."""
    column = tl.program_id(0)
    feature = tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    bias_total = 0.0
    for part in range(parts):
        row = (part * width + column).to(tl.int64)
        total += tl.load(sums + row * FEATURES + feature, mask=feature < FEATURES, other=0.0)
        bias_total += tl.load(bias_sums + row)
    channel = feature % 3
    gradient = _scale(std, channel) * (total + _offset(mean, channel) * bias_total)
    out = d_weight + column * FEATURES + channel * (FEATURES // 3) + feature // 3
    tl.store(out, gradient, mask=feature < FEATURES)
    tl.store(d_bias + column, bias_total)
