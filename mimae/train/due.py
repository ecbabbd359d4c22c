"""Actions that are due after a step."""

from __future__ import annotations

from typing import NamedTuple

from mimae.checkpoints.settings import CheckpointSettings


class Due(NamedTuple):
    """Actions that are due: save, keep the saved checkpoint permanently, stop."""

    save: bool = False
    for_good: bool = False
    """True if the checkpoint is kept permanently, in addition to the newest ones."""
    stop: bool = False

    def after(self, step: int, per_epoch: int, settings: CheckpointSettings, measures_every: int, stop: bool) -> Due:
        """Return the actions that are due after `step`, including earlier ones that are not done yet.

        `measures_every` is the number of epochs between two evaluations.
        """
        epochs, inside = divmod(step, per_epoch)

        def ends(every: int | None) -> bool:
            return bool(every) and inside == 0 and epochs % (every or 1) == 0

        for_good = ends(settings.every_epochs)
        is_measured = settings.best is not None and ends(measures_every)
        save = step % settings.every_steps == 0 or for_good or is_measured
        return Due(self.save or save, self.for_good or for_good, stop)
