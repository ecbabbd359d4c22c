"""Each op in plain PyTorch, for any floating dtype up to float64: the oracle, the fallback and the baseline.

Letters in shapes: B images, N views, L patches, K visible, M targets, T tokens, D width, P patch size. Images
are uint8 (B, H, W, 3); the pixels of a patch are ordered (row, column, channel), as MAE's are; patch ids are
row-major. Losses and statistics accumulate in fp32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from mimae.kernels.philox import philox_words

_MASK_PURPOSE = 1
# A dimension without variation stays zero, instead of being divided by its zero deviation.
_VARIANCE_EPS = 1e-6
_TARGET_EPS = 1e-6


def orthogonal_masks(
    seed: int, epoch: int, sample_ids: Tensor, num_patches: int, num_views: int, num_visible: int
) -> tuple[Tensor, Tensor]:
    """Draw disjoint views of each image (method 1).

    View k shows the patches of ranks kK .. (k+1)K - 1, where patches are ranked by (word l of the sample's mask stream,
    l). sample_ids (B,) int64 -> visible (B, N, K), hidden (B, N, L-K), int32, ascending, on the device of the ids.
    Raises ValueError if N K > L.
    """
    if not 0 < num_visible * num_views <= num_patches:
        raise ValueError(
            f"{num_views} disjoint views of {num_visible} patches need {num_views * num_visible} patches, "
            f"the image has {num_patches}"
        )
    words = philox_words(seed, _MASK_PURPOSE, epoch, sample_ids, num_patches)
    ranks = words.argsort(dim=1, stable=True).argsort(dim=1)
    views = torch.arange(num_views, device=ranks.device)
    shown = (ranks[:, None, :] // num_visible) == views[None, :, None]
    # A stable sort of the flags lists the hidden ids, then the visible ones, each ascending.
    ids = shown.to(torch.uint8).argsort(dim=2, stable=True).to(torch.int32)
    hidden, visible = ids.split([num_patches - num_visible, num_visible], 2)
    return visible.contiguous(), hidden.contiguous()


def _uint8_patches(images: Tensor, patch: int) -> Tensor:
    """Cut images uint8 (B, H, W, 3) into patches uint8 (B, L, 3P^2)."""
    B, H, W, C = images.shape
    if H % patch or W % patch:
        raise ValueError(f"images of {H} x {W} pixels do not divide into patches of {patch}")
    grid = images.view(B, H // patch, patch, W // patch, patch, C)
    return grid.transpose(2, 3).reshape(B, (H // patch) * (W // patch), patch * patch * C)


def _gather(patches: Tensor, ids: Tensor) -> Tensor:
    """Gather patches (B, L, F) by ids (B, N, M) into (B, N, M, F).

    An embedding copies whole rows, where indexing by two tensors copies element by element on a CPU.
    """
    B, L, _ = patches.shape
    first = torch.arange(0, B * L, L, device=ids.device)[:, None, None]
    return F.embedding(ids + first, patches.flatten(0, 1))


def _normalise(patches: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (x / 255 - mean) / std per channel for uint8 patches (..., 3P^2), in `dtype`."""
    repeats = patches.shape[-1] // 3
    scale = (1.0 / (255.0 * std.to(dtype))).repeat(repeats)
    shift = (-mean.to(dtype) / std.to(dtype)).repeat(repeats)
    return torch.addcmul(shift, patches.to(dtype), scale)


def patchify(images: Tensor, patch: int, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return images uint8 (B, H, W, 3) as normalised patches (B, L, 3P^2) in `dtype`."""
    return _normalise(_uint8_patches(images, patch), mean, std, dtype)


def embed_visible(
    images: Tensor,
    visible: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls: Tensor,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Return the encoder's input tokens of every view, from uint8 pixels.

    images (B, H, W, 3) uint8, visible (B, N, K), weight (D, 3, P, P), bias (D,), pos (1+L, D), cls (D,),
    mean and std (3,) -> tokens (B, N, 1+K, D): class token first, then the patches of `visible` in its order.
    """
    patches = _gather(_uint8_patches(images, weight.shape[-1]), visible)
    pixels = _normalise(patches, mean, std, weight.dtype)
    tokens = F.linear(pixels, weight.permute(0, 2, 3, 1).flatten(1), bias)
    tokens = tokens + F.embedding(1 + visible, pos)
    return torch.cat([(cls + pos[0]).expand(*visible.shape[:2], 1, -1), tokens], 2)


def fill_masked(tokens: Tensor, visible: Tensor, targets: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
    """Return the decoder's input: class | visible | targets, each with its position, in that order.

    tokens (B, N, 1+K, Dd), visible (B, N, K), targets (B, N, M), mask_token (Dd,), pos (1+L, Dd)
    -> (B, N, 1+K+M, Dd). Attention does not depend on the order, so the image order is not restored.
    """
    return torch.cat(
        [
            tokens[:, :, :1] + pos[0],
            tokens[:, :, 1:] + F.embedding(1 + visible, pos),
            mask_token + F.embedding(1 + targets, pos),
        ],
        2,
    )


def pixel_loss(
    predictions: Tensor,
    images: Tensor,
    targets: Tensor,
    mean: Tensor,
    std: Tensor,
    normalize: bool,
    scale: float = 1.0,
) -> Tensor:
    """Return `scale` times the sum over images, views and targets of the mean squared error of a patch (method 2).

    With scale = 1 / (B N M) this is L_rec. predictions (B, N, M, 3P^2), images (B, H, W, 3) uint8, targets (B, N, M)
    distinct within a view, mean and std (3,) -> scalar.
    `normalize`: the target patch is standardised to mean 0 and unbiased variance 1 (eps 1e-6).
    """
    patch = round((predictions.shape[-1] / 3) ** 0.5)
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    patches = patchify(images, patch, mean, std, dtype)
    if normalize:
        variance, centre = torch.var_mean(patches, -1, keepdim=True)
        patches = (patches - centre) * (variance + _TARGET_EPS).rsqrt()
    error = predictions.to(dtype) - _gather(patches, targets)
    return error.square().sum() * (scale / predictions.shape[-1])


def view_latents(tokens: Tensor, visible: Tensor | None = None, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return one latent for each view, its direction, and the local moments of CLUB's standardisation.

    tokens: packed by view (B, N, T, D), of which those from place `first` on are pooled (1 leaves out the class token);
    or in image order (B, L, D) with visible (B, N, K), whose tokens are gathered first. -> z (B, N, D), the mean over a
    view's tokens, u = z / |z|, and moments (2, D): mean and sum of squared deviations of z over the B N latents,
    without gradient. Results are fp32 (float64 from float64).
    """
    if visible is not None:
        tokens = _gather(tokens, visible)
    z = tokens[:, :, first:].mean(2, dtype=torch.promote_types(tokens.dtype, torch.float32))
    flat = z.detach().flatten(0, 1)
    centre = flat.mean(0)
    return z, F.normalize(z, dim=-1), torch.stack([centre, (flat - centre).square().sum(0)])


def _products_of_views(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ordered view pairs (a, b) with their products u(i,a).u(j,b) (b, B), in fp32 or float64.

    On one rank only a < b, because (b, a) is the transpose.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    one_rank = rows.shape[0] == columns.shape[0]
    for a, b in permutations(range(rows.shape[1]), 2):
        if a < b or not one_rank:
            yield a, b, (rows[:, a] @ columns[:, b].T).to(dtype)


def infonce_lse(rows: Tensor, columns: Tensor, offset: int, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-sum-exp and positives of InfoNCE for ordered view pairs (a, b) (method 3).

    rows u (b, N, D) of this rank, which are columns[offset : offset + b]; columns u (B, N, D) of all ranks; tau (1,).
    -> lse (b, N, N) and positives (b, N, N) at [i, a, b]: over all j of u(i,a).u(j,b)/tau, and at j = i. Results are
    fp32 (float64 from float64). The entries a = b are zero.
    """
    b, N, _ = rows.shape
    dtype = torch.promote_types(rows.dtype, torch.float32)
    lse, positives = rows.new_zeros(b, N, N, dtype=dtype), rows.new_zeros(b, N, N, dtype=dtype)
    for a, other, products in _products_of_views(rows, columns):
        scores = products / tau
        lse[:, a, other] = scores.logsumexp(1)
        positives[:, a, other] = scores.diagonal(offset)
        if b == columns.shape[0]:
            lse[:, other, a] = scores.logsumexp(0)
            positives[:, other, a] = positives[:, a, other]
    return lse, positives


def infonce_grad(rows: Tensor, columns: Tensor, offset: int, tau: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of S = sum over all rows i and a != b of lse(i,a,b) - positive(i,a,b).

    rows (b, N, D), columns (B, N, D), offset and tau as in `infonce_lse`; lse (B, N, N): its result for all rows
    -> d_u (b, N, D): dS/du of this rank's latents, as rows and as columns; d_tau (1,): this rank's part of dS/dtau,
    which is the sum over the ranks. Results are fp32 (float64 from float64). u(i,a) is a row of the pair (a,b) and a
    column of (b,a), and both use the same score, so one product serves both.
    """
    b = rows.shape[0]
    d_u = torch.zeros_like(rows, dtype=lse.dtype)
    for a, other, products in _products_of_views(rows, columns):
        scores = products / tau
        weights = (scores - lse[offset : offset + b, a, other, None]).exp_()
        weights += scores.sub_(lse[:, other, a]).exp_()
        weights.diagonal(offset).sub_(2)
        weights = weights.to(rows.dtype)
        d_u[:, a] += weights @ columns[:, other]
        if b == columns.shape[0]:
            d_u[:, other] += weights.T @ rows[:, a]
    d_u /= tau
    # S depends on u and tau only through u.u / tau: u dS/du = -2 tau dS/dtau.
    return d_u, (rows * d_u).sum() / (-2 * tau)


def club_terms(
    z: Tensor, mu: Tensor, log_s2: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sums of CLUB and of V's likelihood over this rank's images, in linear time (method 3).

    z (B, N, D); mu and log_s2 (B, D) of V; mean and (biased) variance (D,) of z over the global batch, which
    standardise y = (z - mean) / sqrt(variance + eps). -> the sums over i, k, d of
    [mu^2 + v - (mu - y)^2] / (2 s2), with v the variance of y, and of [log s2 + (y - mu)^2 / s2] / 2; and the sums (D,)
    over i of 1/s2 and mu/s2, which `club_grad` needs from all ranks.
    """
    N, dtype = z.shape[1], torch.promote_types(z.dtype, torch.float32)
    mu, log_s2 = mu.to(dtype), log_s2.to(dtype)
    # Work in place, so that only one tensor of z's size and a few of mu's size are allocated.
    scale = (variance + _VARIANCE_EPS).rsqrt()
    square = _error(z, mu, mean, scale).square_().sum(1)
    inverse = (-log_s2).exp_()
    # Use the rounded scale: CLUB is a small difference of large sums, whose errors must cancel.
    spread = variance * scale.square()
    club = mu.square().add_(spread).mul_(N).sub_(square).mul_(inverse).sum() / 2
    nll = (N * log_s2.sum() + square.mul_(inverse).sum()) / 2
    return club, nll, inverse.sum(0), (mu * inverse).sum(0)


def _error(z: Tensor, mu: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return y - mu (B, N, D), where y = (z - mean) scale."""
    return (z - mean.to(mu.dtype)).mul_(scale).sub_(mu[:, None])


def club_grad(
    z: Tensor,
    mu: Tensor,
    log_s2: Tensor,
    mean: Tensor,
    variance: Tensor,
    inverse_sum: Tensor,
    mu_inverse_sum: Tensor,
    images: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the two sums of `club_terms` over the global batch of `images` images.

    inverse_sum, mu_inverse_sum (D,): the sums of 1/s2 and mu/s2 over all ranks. -> d_z (B, N, D) of the CLUB sum,
    including the gradient through the moments of y (the standardisation itself uses detached moments); d_mu and
    d_log_s2 (B, D) of the likelihood's sum.
    """
    N, dtype = z.shape[1], torch.promote_types(z.dtype, torch.float32)
    mu, inverse = mu.to(dtype), (-log_s2.to(dtype)).exp_()
    scale = (variance + _VARIANCE_EPS).rsqrt()
    error = _error(z, mu, mean, scale)
    d_mu = -error.sum(1) * inverse
    d_log_s2 = (N - error.square().sum(1) * inverse) / 2
    # The gradient through the moments, at m = 0, is dm/dy = 1/(BN) times -sum (mu - m)/s2, and dv/dy = 2 y/(BN) times
    # sum 1/(2 s2). With the image's own term it is (mu - y)/s2 + pull y - push, which is linear in y - mu.
    pull, push = inverse_sum / images, mu_inverse_sum / images
    slope, offset = (pull - inverse) * scale, (pull * mu - push) * scale
    return error.mul_(slope[:, None]).add_(offset[:, None]), d_mu, d_log_s2
