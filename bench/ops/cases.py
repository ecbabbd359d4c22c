"""The ops as the benches run them: inputs as training has them, the fused passes, the same in eager PyTorch.

Passes are the launchers of `mimae.kernels`, from tensors to tensors, so they run on meta tensors too. The eager forms
are those of `baselines/eager.py`; what its loader would do beforehand is `prepare`'s, which nobody counts or times.

Letters in shapes: B images, N views, L patches, K visible, M targets, D width, Dd decoder width, P patch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimae.errors import UserError
from mimae.kernels import club, infonce, reference
from mimae.kernels.embed_visible import backward as differentiate_embedding
from mimae.kernels.embed_visible import forward as embed
from mimae.kernels.fill_masked import backward as split_rows
from mimae.kernels.fill_masked import forward as fill
from mimae.kernels.orthogonal_masks import forward as draw_masks
from mimae.kernels.pixel_loss import backward as scale_gradient
from mimae.kernels.pixel_loss import forward as compare_pixels
from mimae.kernels.runtime import Launch, Target, watching
from mimae.kernels.view_latents import backward as spread_latents
from mimae.kernels.view_latents import forward as pool_latents

Inputs = dict[str, Any]
"""Arguments by name."""


class Size(NamedTuple):
    """A production size: a ViT at an image size, masks, and a batch."""

    name: str
    width: int
    batch: int
    precision: torch.dtype = torch.bfloat16
    """Of the matrix products. What autocast keeps in fp32 (norms, positions, latents) is fp32."""
    decoder_width: int = 512
    side: int = 224
    patch: int = 16
    views: int = 4
    loss_weight: float = 1.0
    """In backward: under gradient accumulation, one over its steps."""

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2

    @property
    def visible(self) -> int:
        return self.patches // self.views


class Pass(NamedTuple):
    """A fused pass over an op's inputs."""

    name: str
    run: Callable[[Inputs], Sequence[Tensor]]
    """Launches the kernels; all that it returns has to be written."""
    reads: Callable[[Inputs], Sequence[Tensor]]
    """What has to be read."""
    flops: Callable[[Size, int], float] = lambda size, batch: 0.0
    """Of the matrix products of a batch, a multiply-add as two."""


class Case(NamedTuple):
    """An op, or two that belong together, as `passes` forward and backward."""

    op: str
    sizes: Sequence[Size]
    inputs: Callable[[Size, int, torch.device], Inputs]
    """Of a batch; of noise, reproducible after `torch.manual_seed`."""
    passes: Sequence[Pass]
    prepare: Callable[[Size, Inputs], Inputs]
    """The same inputs in the form of `eager`."""
    eager: Callable[[Inputs], Sequence[Tensor]]
    """Differentiable in what `trained` names, through the results that have a gradient in `upstream`."""
    trained: Sequence[str] = ()
    upstream: Sequence[str] = ()


def named(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """Some of the inputs, as keyword arguments."""
    return {name: inputs[name] for name in names}


def numbers(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors, each once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def recorded(fused: Pass, inputs: Inputs, target: Target) -> tuple[list[Launch], Sequence[Tensor]]:
    """The launches of a pass over meta tensors, for a GPU like `target`, and its results."""
    launches: list[Launch] = []
    with watching(launches.append, target):
        results = fused.run(inputs)
    return launches, results


VIT_B = Size("ViT-B/16", 768, 1024)
VIT_L = Size("ViT-L/16", 1024, 1024)
MODELS = (VIT_B, VIT_L)
LARGE_BATCHES = tuple(size._replace(name=f"{size.name} B=4096", batch=4096) for size in MODELS)
"""For the ops whose work grows with the square of the batch in their usual forms."""


# Inputs


def _images(size: Size, batch: int, device: torch.device) -> Inputs:
    """Pixels with the masks of all views, and the statistics of ImageNet."""
    visible, hidden = reference.orthogonal_masks(
        0, 0, torch.arange(batch, device=device), size.patches, size.views, size.visible
    )
    return {
        "images": torch.randint(256, (batch, size.side, size.side, 3), dtype=torch.uint8, device=device),
        "visible": visible,
        "targets": hidden,
        "mean": torch.tensor((0.485, 0.456, 0.406)).to(device),
        "std": torch.tensor((0.229, 0.224, 0.225)).to(device),
    }


def _latents(size: Size, batch: int, device: torch.device) -> Tensor:
    """Unit vectors (B, N, D)."""
    return F.normalize(torch.randn(batch, size.views, size.width, device=device), dim=-1)


def _by_view(tensor: Tensor) -> Tensor:
    """(B, N, ...) -> (N B, ...), as images repeated once per view lie."""
    return tensor.transpose(0, 1).flatten(0, 1)


def _floats(inputs: Inputs) -> Tensor:
    """Normalised images (B, 3, H, W)."""
    return ((inputs["images"] / 255 - inputs["mean"]) / inputs["std"]).permute(0, 3, 1, 2).contiguous()


def _places(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """ids_keep (N B, K) and ids_restore (N B, L) of MAE."""
    keep = _by_view(inputs["visible"]).long()
    return keep, torch.cat([keep, _by_view(inputs["targets"]).long()], 1).argsort(1)


# orthogonal_masks


def _mask_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    return {
        "sample_ids": torch.arange(batch, device=device),
        "num_patches": size.patches,
        "num_views": size.views,
        "num_visible": size.visible,
    }


def _two_argsorts(inputs: Inputs) -> Sequence[Tensor]:
    ids, views, shown = inputs["sample_ids"], inputs["num_views"], inputs["num_visible"]
    permutation = torch.rand(ids.shape[0], inputs["num_patches"], device=ids.device).argsort(1)
    shuffle = torch.cat([permutation.roll(-view * shown, 1) for view in range(views)])
    return shuffle[:, :shown], shuffle.argsort(1)


ORTHOGONAL_MASKS = Case(
    op="orthogonal_masks",
    sizes=(Size("L=196", 0, 1024),),
    inputs=_mask_inputs,
    passes=(
        Pass(
            "orthogonal_masks",
            run=lambda inputs: draw_masks(seed=0, epoch=0, **inputs),
            reads=lambda inputs: [inputs["sample_ids"]],
        ),
    ),
    prepare=lambda size, inputs: inputs,
    eager=_two_argsorts,
)


# embed_visible


def _embedding_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    features, width = 3 * size.patch**2, size.width
    return {
        **_images(size, batch, device),
        "weight": torch.randn(width, 3, size.patch, size.patch, device=device) / features**0.5,
        "bias": torch.randn(width, device=device),
        "pos": torch.randn(1 + size.patches, width, device=device),
        "cls": torch.randn(width, device=device),
        # Positions in fp32 make the tokens fp32.
        "d_tokens": torch.randn(batch, size.views, 1 + size.visible, width, device=device),
        "product": size.precision,
    }


_EMBEDDING_ARGUMENTS = ("images", "visible", "weight", "bias", "pos", "cls", "mean", "std")


def _embedding_gradients(inputs: Inputs) -> Sequence[Tensor]:
    arguments = named(inputs, ("d_tokens", "images", "visible", "mean", "std", "product"))
    d_weight, d_bias = differentiate_embedding(**arguments, patch=inputs["weight"].shape[-1])
    return d_weight, d_bias, inputs["d_tokens"][:, :, 0].sum((0, 1))


def _projection_flops(size: Size, batch: int) -> float:
    return 2.0 * batch * size.views * size.visible * 3 * size.patch**2 * size.width


def _prepare_convolution(size: Size, inputs: Inputs) -> Inputs:
    keep, _ = _places(inputs)
    as_is = {name: inputs[name] for name in ("weight", "bias", "pos", "cls", "product")}
    return {**as_is, "images": _floats(inputs), "keep": keep, "d_tokens": _by_view(inputs["d_tokens"])}


def _convolution(inputs: Inputs) -> Sequence[Tensor]:
    weight, keep, pos = inputs["weight"], inputs["keep"], inputs["pos"]
    images = inputs["images"].repeat(keep.shape[0] // inputs["images"].shape[0], 1, 1, 1)
    with torch.autocast(images.device.type, inputs["product"], enabled=inputs["product"] != weight.dtype):
        patches = F.conv2d(images, weight, inputs["bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    tokens = torch.gather(patches + pos[1:], 1, keep[:, :, None].expand(-1, -1, weight.shape[0]))
    return [torch.cat([(inputs["cls"] + pos[0]).expand(keep.shape[0], 1, -1), tokens], 1)]


EMBED_VISIBLE = Case(
    op="embed_visible",
    sizes=MODELS,
    inputs=_embedding_inputs,
    passes=(
        Pass(
            "embed_visible",
            run=lambda inputs: [embed(**named(inputs, (*_EMBEDDING_ARGUMENTS, "product")))],
            reads=lambda inputs: [inputs[name] for name in _EMBEDDING_ARGUMENTS],
            flops=_projection_flops,
        ),
        Pass(
            "embed_visible backward",
            run=_embedding_gradients,
            reads=lambda inputs: [inputs[name] for name in ("d_tokens", "images", "visible", "mean", "std")],
            flops=_projection_flops,
        ),
    ),
    prepare=_prepare_convolution,
    eager=_convolution,
    trained=("weight", "bias", "cls"),
    upstream=("d_tokens",),
)


# fill_masked


def _row_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    images, width = _images(size, batch, device), size.decoder_width
    rows = (batch, size.views, 1 + size.patches, width)
    return {
        "visible": images["visible"],
        "targets": images["targets"],
        "tokens": torch.randn(batch, size.views, 1 + size.visible, width, device=device).to(size.precision),
        "mask_token": torch.randn(width, device=device),
        "pos": torch.randn(1 + size.patches, width, device=device),
        "d_rows": torch.randn(rows, device=device),
    }


_ROW_ARGUMENTS = ("tokens", "visible", "targets", "mask_token", "pos")


def _prepare_restoring(size: Size, inputs: Inputs) -> Inputs:
    _, restore = _places(inputs)
    as_is = {name: inputs[name] for name in ("mask_token", "pos")}
    d_class, d_others = _by_view(inputs["d_rows"]).split([1, restore.shape[1]], 1)
    d_rows = torch.cat([d_class, d_others.gather(1, restore[:, :, None].expand_as(d_others))], 1)
    return {**as_is, "restore": restore, "tokens": _by_view(inputs["tokens"]), "d_rows": d_rows}


def _restored(inputs: Inputs) -> Sequence[Tensor]:
    tokens, restore = inputs["tokens"], inputs["restore"]
    hidden = 1 + restore.shape[1] - tokens.shape[1]
    mask_tokens = inputs["mask_token"].to(tokens.dtype).repeat(tokens.shape[0], hidden, 1)
    shuffled = torch.cat([tokens[:, 1:], mask_tokens], 1)
    restored = torch.gather(shuffled, 1, restore[:, :, None].expand(-1, -1, tokens.shape[2]))
    return [torch.cat([tokens[:, :1], restored], 1) + inputs["pos"]]


FILL_MASKED = Case(
    op="fill_masked",
    sizes=(Size("decoder 512", 0, 1024),),
    inputs=_row_inputs,
    passes=(
        Pass(
            "fill_masked",
            run=lambda inputs: [fill(*(inputs[name] for name in _ROW_ARGUMENTS))],
            reads=lambda inputs: [inputs[name] for name in _ROW_ARGUMENTS],
        ),
        Pass(
            "fill_masked backward",
            run=lambda inputs: split_rows(
                inputs["d_rows"], inputs["tokens"].shape[2], inputs["tokens"].dtype, inputs["mask_token"].dtype
            ),
            reads=lambda inputs: [inputs["d_rows"]],
        ),
    ),
    prepare=_prepare_restoring,
    eager=_restored,
    trained=("tokens", "mask_token"),
    upstream=("d_rows",),
)


# pixel_loss


def _prediction_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    shape = (batch, size.views, size.patches - size.visible, 3 * size.patch**2)
    predictions = torch.randn(shape, device=device).to(size.precision)
    weight = torch.full((), size.loss_weight, device=device)
    return {
        **_images(size, batch, device),
        "predictions": predictions,
        "weight": weight,
        "rescaled": size.loss_weight != 1,
    }


_PREDICTION_ARGUMENTS = ("predictions", "images", "targets", "mean", "std")


def _loss_and_gradient(inputs: Inputs) -> Sequence[Tensor]:
    share = 1 / inputs["targets"].numel()
    arguments = named(inputs, _PREDICTION_ARGUMENTS)
    return compare_pixels(**arguments, normalize=True, scale=share, with_gradient=True)


def _finished_gradient(inputs: Inputs) -> Sequence[Tensor]:
    """Forward has made it: of a loss whose weight is 1 it stays as it is, else it is written once more."""
    scale_gradient(inputs["predictions"], inputs["weight"], 1.0)
    return _rescaled(inputs)


def _rescaled(inputs: Inputs) -> list[Tensor]:
    return [inputs["predictions"]] if inputs["rescaled"] else []


def _prepare_targets(size: Size, inputs: Inputs) -> Inputs:
    """MAE predicts every patch of a view, in image order, and has its images once per view."""
    _, restore = _places(inputs)
    shown = inputs["predictions"].new_zeros(restore.shape[0], size.visible, 3 * size.patch**2)
    predictions = torch.cat([shown, _by_view(inputs["predictions"])], 1)
    predictions = predictions.gather(1, restore[:, :, None].expand_as(predictions))
    images = _floats(inputs).repeat(size.views, 1, 1, 1)
    return {
        "predictions": predictions,
        "images": images,
        "hidden": restore >= size.visible,
        "patch": size.patch,
        "weight": inputs["weight"],
    }


def _materialised_targets(inputs: Inputs) -> Sequence[Tensor]:
    images, P = inputs["images"], inputs["patch"]
    B, C, H, W = images.shape
    target = images.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1)
    target = target.reshape(B, (H // P) * (W // P), P * P * C)
    centre, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - centre) / (variance + 1e-6) ** 0.5
    loss = ((inputs["predictions"].float() - target) ** 2).mean(-1)
    hidden = inputs["hidden"].to(loss.dtype)
    return [(loss * hidden).sum() / hidden.sum()]


PIXEL_LOSS = Case(
    op="pixel_loss",
    sizes=(Size("patch 16", 0, 1024), Size("patch 16, weight 1/2", 0, 1024, loss_weight=0.5)),
    inputs=_prediction_inputs,
    passes=(
        Pass(
            "pixel_loss",
            run=_loss_and_gradient,
            reads=lambda inputs: [inputs[name] for name in _PREDICTION_ARGUMENTS],
        ),
        Pass(
            "pixel_loss backward",
            run=_finished_gradient,
            reads=lambda inputs: [inputs["weight"], *_rescaled(inputs)],
        ),
    ),
    prepare=_prepare_targets,
    eager=_materialised_targets,
    trained=("predictions",),
    upstream=("weight",),
)


# view_latents


def _token_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    # The encoder's final norm gives fp32.
    z = torch.randn(batch, size.views, size.width, device=device)
    tokens = torch.randn(batch, size.views, 1 + size.visible, size.width, device=device)
    return {"tokens": tokens, "z": z, "d_z": torch.randn_like(z), "d_u": torch.randn_like(z)}


def _pooled(inputs: Inputs) -> Sequence[Tensor]:
    z = inputs["tokens"][:, 1:].mean(1)
    return z, F.normalize(z, dim=-1), *torch.var_mean(z.detach(), 0, correction=0)


VIEW_LATENTS = Case(
    op="view_latents",
    sizes=MODELS,
    inputs=_token_inputs,
    passes=(
        Pass(
            "view_latents",
            run=lambda inputs: pool_latents(inputs["tokens"], None, 1),
            reads=lambda inputs: [inputs["tokens"][:, :, 1:]],
        ),
        Pass(
            "view_latents backward",
            run=lambda inputs: [
                spread_latents(
                    **named(inputs, ("z", "d_z", "d_u")),
                    visible=None,
                    first=1,
                    length=inputs["tokens"].shape[2],
                    dtype=inputs["tokens"].dtype,
                )
            ],
            reads=lambda inputs: [inputs[name] for name in ("z", "d_z", "d_u")],
        ),
    ),
    prepare=lambda size, inputs: {name: _by_view(value) for name, value in inputs.items()},
    eager=_pooled,
    trained=("tokens",),
    upstream=("d_z", "d_u"),
)


# infonce_lse, infonce_grad


def _infonce_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    u = _latents(size, batch, device).to(size.precision)
    lse = torch.randn(batch, size.views, size.views, device=device)
    return {"u": u, "tau": torch.full((1,), 0.07, device=device), "lse": lse}


def _full_logits(inputs: Inputs) -> Sequence[Tensor]:
    u, tau = inputs["u"], inputs["tau"]
    labels = torch.arange(u.shape[1], device=u.device)
    pairs = [(a, b) for a in range(u.shape[0]) for b in range(u.shape[0]) if a != b]
    return [torch.stack([F.cross_entropy(u[a] @ u[b].T / tau, labels) for a, b in pairs]).mean()]


def _products(of_each: int) -> Callable[[Size, int], float]:
    """FLOPs of `of_each` products for every unordered pair of views."""
    return lambda size, batch: of_each * size.views * (size.views - 1) / 2 * 2.0 * batch**2 * size.width


INFONCE = Case(
    op="infonce",
    # Training keeps its latents in fp32: rounded to bf16 they would move a score by 1e-3 to 1e-2.
    sizes=(
        *(size._replace(precision=torch.float32) for size in LARGE_BATCHES),
        *(size._replace(name=f"{size.name} bf16") for size in LARGE_BATCHES),
    ),
    inputs=_infonce_inputs,
    passes=(
        Pass(
            "infonce_lse",
            run=lambda inputs: infonce.forward(inputs["u"], inputs["u"], 0, inputs["tau"]),
            reads=lambda inputs: [inputs["u"], inputs["tau"]],
            flops=_products(1),
        ),
        Pass(
            "infonce_grad",
            run=lambda inputs: infonce.backward(inputs["u"], inputs["u"], 0, inputs["tau"], inputs["lse"]),
            reads=lambda inputs: [inputs["u"], inputs["tau"], inputs["lse"]],
            flops=_products(3),
        ),
    ),
    prepare=lambda size, inputs: {"u": inputs["u"].transpose(0, 1).contiguous(), "tau": inputs["tau"]},
    eager=_full_logits,
    trained=("u",),
)


# club_terms, club_grad


def _club_inputs(size: Size, batch: int, device: torch.device) -> Inputs:
    # V gives mu as the first half of its output, and log s2 after a tanh.
    mu, log_s2 = torch.randn(batch, 2 * size.width, device=device).chunk(2, 1)
    of_batch = ("mean", "variance", "inverse_sum", "mu_inverse_sum")
    return {
        "z": torch.randn(batch, size.views, size.width, device=device),
        "mu": mu,
        "log_s2": log_s2.tanh(),
        **{name: torch.rand(size.width, device=device) for name in of_batch},
    }


_CLUB_ARGUMENTS = ("z", "mu", "log_s2", "mean", "variance")


def _pairwise(inputs: Inputs) -> Sequence[Tensor]:
    """CLUB over all pairs of a latent and an image, and the likelihood; z (N B, D)."""
    z, mu, log_s2 = inputs["z"], inputs["mu"], inputs["log_s2"]
    views = z.shape[0] // mu.shape[0]
    variance, mean = torch.var_mean(z.detach(), 0, correction=0)
    y = (z - mean) / (variance + 1e-6).sqrt()

    def log_density(y: Tensor, mu: Tensor, log_s2: Tensor) -> Tensor:
        return -0.5 * (log_s2 + (y - mu) ** 2 / log_s2.exp())

    fixed_mu, fixed_log_s2 = mu.detach(), log_s2.detach()
    positive = log_density(y, fixed_mu.repeat(views, 1), fixed_log_s2.repeat(views, 1)).sum(-1).mean()
    pairs = log_density(y[None], fixed_mu[:, None], fixed_log_s2[:, None])
    nll = -log_density(y.detach(), mu.repeat(views, 1), log_s2.repeat(views, 1)).mean()
    return positive - pairs.sum(-1).mean(), nll


CLUB = Case(
    op="club",
    sizes=LARGE_BATCHES,
    inputs=_club_inputs,
    passes=(
        Pass(
            "club_terms",
            run=lambda inputs: club.forward(*(inputs[name] for name in _CLUB_ARGUMENTS)),
            reads=lambda inputs: [inputs[name] for name in _CLUB_ARGUMENTS],
        ),
        Pass(
            "club_grad",
            run=lambda inputs: club.backward(**inputs, images=inputs["z"].shape[0]),
            reads=lambda inputs: list(inputs.values()),
        ),
    ),
    prepare=lambda size, inputs: {**inputs, "z": _by_view(inputs["z"])},
    eager=_pairwise,
    trained=("z", "mu", "log_s2"),
)

CASES = (ORTHOGONAL_MASKS, EMBED_VISIBLE, FILL_MASKED, PIXEL_LOSS, VIEW_LATENTS, INFONCE, CLUB)


def chosen(ops: Sequence[str] | None) -> list[Case]:
    """The cases of the named ops, or all. Raises UserError for another name."""
    known = {case.op: case for case in CASES}
    if unknown := sorted(set(ops or ()) - known.keys()):
        raise UserError(f"no case named {', '.join(unknown)}: legal is {', '.join(known)}")
    return [known[op] for op in ops] if ops else list(CASES)
