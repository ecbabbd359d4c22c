"""InfoNCE over pairs of views, against full logits; forward `infonce_lse`, backward `infonce_grad`.

The letters in shapes are those of `case`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mimae.bench.ops.cases.case import LARGE_BATCHES, Bound, Case, Count, Inputs, Pass, Point, Size, pick
from mimae.kernels.infonce import launch_backward, launch_forward
from mimae.kernels.runtime import Launch
from mimae.objective.infonce import InfoNCE


def _tiles_and_panels(size: Size, batch: int, launches: Sequence[Launch]) -> list[float]:
    """Return the quantities of which the traffic is linear.

    The number of tiles is quadratic in the batch. The gradient of all latents is read and written again for each panel
    of weights, which takes a pair of launches.
    """
    squares, latents, panels = batch**2, batch * size.width, len(launches)
    return [squares * size.width, squares, latents * panels, latents, batch * panels, batch, panels]


_two_by_two = [Point(batch, width=width) for batch in (256, 512) for width in (128, 256)]


def _latents(size: Size, batch: int, device: torch.device) -> Tensor:
    """Return unit vectors (B, N, D)."""
    return F.normalize(torch.randn(batch, size.views, size.width, device=device), dim=-1)


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
    """Return a function for the FLOPs of `of_each` products for every unordered pair of views."""
    return lambda size, batch: of_each * size.views * (size.views - 1) / 2 * 2.0 * batch**2 * size.width


def chunked_infonce(inputs: Inputs, rows: int = 512) -> Sequence[Tensor]:
    """Return InfoNCE with logits for some rows at a time, which backward recomputes; u (N, B, D)."""
    u, tau = inputs["u"], inputs["tau"]

    def part(a: Tensor, b: Tensor, first: int) -> Tensor:
        labels = torch.arange(first, first + len(a), device=u.device)
        return F.cross_entropy((a @ b.T).float() / tau, labels, reduction="sum")

    views, images = u.shape[:2]
    terms = [
        checkpoint(part, u[a, first : first + rows], u[b], first, use_reentrant=False)
        for a in range(views)
        for b in range(views)
        if a != b
        for first in range(0, images, rows)
    ]
    return [torch.stack(terms).sum() / (images * views * (views - 1))]


def _infcl(inputs: Inputs) -> Sequence[Tensor]:
    """Return the fused loss of the `inf-cl` package for each ordered pair of views; u (N, B, D)."""
    from inf_cl import cal_flash_loss

    u, pairs = inputs["u"], [(a, b) for a in range(len(inputs["u"])) for b in range(len(inputs["u"])) if a != b]
    labels = torch.arange(u.shape[1], device=u.device)
    return [torch.stack([cal_flash_loss(u[a], u[b], labels, 1 / inputs["tau"]).mean() for a, b in pairs]).mean()]


def _others(device: torch.device) -> dict[str, Callable[[Inputs], Sequence[Tensor]]]:
    """Return the form with logits in chunks, and on a GPU that of the `inf-cl` package if it is installed."""
    has_package = device.type == "cuda" and find_spec("inf_cl") is not None
    return {"chunked": chunked_infonce} | ({"inf-cl": _infcl} if has_package else {})


INFONCE = Case(
    op="infonce",
    # Training keeps latents in fp32: rounding to bf16 would change a score by 1e-3 to 1e-2.
    sizes=(
        *(size._replace(precision=torch.float32) for size in LARGE_BATCHES),
        *(size._replace(name=f"{size.name} bf16") for size in LARGE_BATCHES),
    ),
    inputs=_infonce_inputs,
    passes=(
        Pass(
            "infonce_lse",
            counted=Count(
                [*_two_by_two, Point(768, width=128), Point(256)], _tiles_and_panels, adaptive=("_partial_kernel.D",)
            ),
            run=lambda inputs: launch_forward(inputs["u"], inputs["u"], 0, inputs["tau"]),
            reads=pick("u", "tau"),
            flops=_products(1),
        ),
        Pass(
            "infonce_grad",
            # The first four have a panel for each tile of rows, the others for two tiles and for all.
            counted=Count(
                [
                    *_two_by_two,
                    Point(512, width=384),
                    Point(512, width=512),
                    Point(256),
                    Point(512),
                    Point(384, width=256),
                ],
                _tiles_and_panels,
                adaptive=("_weights_kernel.D", "_accumulate_kernel.D"),
            ),
            run=lambda inputs: launch_backward(inputs["u"], inputs["u"], 0, inputs["tau"], inputs["lse"]),
            reads=pick("u", "tau", "lse"),
            flops=_products(3),
        ),
    ),
    prepare=lambda size, inputs: {"u": inputs["u"].transpose(0, 1).contiguous(), "tau": inputs["tau"]},
    eager=_full_logits,
    public=lambda inputs: [InfoNCE.apply(inputs["u"], inputs["u"].detach(), inputs["tau"])],
    bound=Bound(extra=1.0, hopper=True),
    others=_others,
    trained=("u",),
)
