"""When something that ended is started again, and whether. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from vcnode.models.pod import RestartPolicy
from vcnode.models.records import Restarts

_MOST_DOUBLINGS = 32


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waiting times: *first_s*, doubled for each restart in a row up to *most_s*.

    What has run for *reset_after_s* seconds was healthy: it begins anew with *first_s*.
    """

    first_s: float
    most_s: float
    reset_after_s: float

    def delay_s(self, streak: int) -> float:
        """Seconds to wait before the restart that follows *streak* others in a row."""
        return min(self.most_s, self.first_s * 2.0 ** min(streak, _MOST_DOUBLINGS))


def after_end(
    before: Restarts,
    *,
    policy: RestartPolicy,
    max_restarts: int | None,
    failed: bool,
    ran_s: float,
    now: datetime,
    backoff: Backoff,
) -> Restarts:
    """What follows an end: ``at`` of the result is when to start again, or None.

    Args:
        before: Restarts so far.
        policy: As given by the user.
        max_restarts: Most in a row; None: any number.
        failed: Whether it ended badly.
        ran_s: Seconds that it ran.
        now: When it ended.
        backoff: The waiting times.
    """
    streak = 0 if ran_s >= backoff.reset_after_s else before.streak
    wanted = policy is RestartPolicy.ALWAYS or (policy is RestartPolicy.ON_FAILURE and failed)
    if not wanted or before.cancelled or (max_restarts is not None and streak >= max_restarts):
        return before.model_copy(update={"streak": streak, "at": None})
    at = now + timedelta(seconds=backoff.delay_s(streak))
    return before.model_copy(update={"streak": streak + 1, "at": at})
