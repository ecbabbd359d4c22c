"""The ops of MI-MAE, all that anyone outside this package may import.

Depends on torch alone. Letters in shapes: B images, N views, L patches, K visible, M targets, T tokens,
D width, P patch size.
"""

from mimae.kernels.philox import philox4x32, philox_words
from mimae.kernels.reference import (
    club_grad,
    club_terms,
    embed_visible,
    fill_masked,
    infonce_grad,
    infonce_lse,
    orthogonal_masks,
    patchify,
    pixel_loss,
    view_latents,
)

__all__ = [
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
    "view_latents",
]
