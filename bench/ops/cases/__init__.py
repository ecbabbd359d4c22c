"""The cases of all ops. Benches, traffic and their tests use this list; add a new op here."""

from __future__ import annotations

from collections.abc import Sequence

from mimae.bench.ops.cases.case import Case
from mimae.bench.ops.cases.club import CLUB
from mimae.bench.ops.cases.embed_visible import EMBED_VISIBLE
from mimae.bench.ops.cases.fill_masked import FILL_MASKED
from mimae.bench.ops.cases.infonce import INFONCE
from mimae.bench.ops.cases.orthogonal_masks import ORTHOGONAL_MASKS
from mimae.bench.ops.cases.pixel_loss import PIXEL_LOSS
from mimae.bench.ops.cases.view_latents import VIEW_LATENTS
from mimae.errors import UserError

CASES = (ORTHOGONAL_MASKS, EMBED_VISIBLE, FILL_MASKED, PIXEL_LOSS, VIEW_LATENTS, INFONCE, CLUB)


def chosen(ops: Sequence[str] | None) -> list[Case]:
    """Return the cases of the named ops, or all cases. Raises UserError for an unknown name."""
    known = {case.op: case for case in CASES}
    if unknown := sorted(set(ops or ()) - known.keys()):
        raise UserError(f"no case named {', '.join(unknown)}: legal is {', '.join(known)}")
    return [known[op] for op in ops] if ops else list(CASES)
