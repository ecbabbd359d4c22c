"""The ops of MI-MAE: the public interface of this package.

Each op has a fused implementation in its module and one in plain PyTorch in `reference`; `impl` chooses, and "auto"
takes the fused one on a GPU. The package depends on torch, and on triton if it is installed. Letters in shapes: B
images, N views, L patches, K visible, M targets, T tokens, D width, P patch size.
"""

from mimae.kernels.club import club_grad, club_terms
from mimae.kernels.embed_visible import embed_visible
from mimae.kernels.fill_masked import fill_masked
from mimae.kernels.flops import FLOPS
from mimae.kernels.infonce import infonce_grad, infonce_lse
from mimae.kernels.orthogonal_masks import orthogonal_masks
from mimae.kernels.philox import philox4x32, philox_words
from mimae.kernels.pixel_loss import pixel_loss
from mimae.kernels.reference import patchify
from mimae.kernels.runtime import prefer, reason
from mimae.kernels.view_latents import view_latents

__all__ = [
    "FLOPS",
    "club_grad",
    "club_terms",
    "embed_visible",
    "fill_masked",
    "infonce_grad",
    "infonce_lse",
    "orthogonal_masks",
    "patchify",
    "philox4x32",
    "philox_words",
    "pixel_loss",
    "prefer",
    "reason",
    "view_latents",
]
