"""Actions that are due once a step is over."""

from __future__ import annotations

from typing import NamedTuple

from mimae.checkpoints.settings import CheckpointSettings


class Due(NamedTuple):
    """Actions: to save, to keep the saved checkpoint for good, to stop."""

    save: bool = False
    for_good: bool = False
    """The checkpoint stays, beside the newest ones."""
    stop: bool = False

    def after(self, step: int, per_epoch: int, settings: CheckpointSettings, measures_every: int, stop: bool) -> Due:
        """Return what is due after `step`, with what was due before and is not done yet; `measures_every`: epochs
        between two evaluations."""
        epochs, inside = divmod(step, per_epoch)

        def ends(every: int | None) -> bool:
            return bool(every) and inside == 0 and epochs % (every or 1) == 0

        for_good = ends(settings.every_epochs)
        is_measured = settings.best is not None and ends(measures_every)
        save = step % settings.every_steps == 0 or for_good or is_measured
        return Due(self.save or save, self.for_good or for_good, stop)
