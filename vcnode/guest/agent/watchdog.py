"""The guest's own end, for a host of which nobody hears any more: see ``on_disconnect``, docs/containers.md.

It is one timer of the loop. An idle guest is woken by what sets it only; while the host has stopped the
vCPUs the monotonic clock stands, and so does this.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vcnode.guest.agent.loop import Loop, Timer
    from vcnode.guest.agent.params import Params

MAX_MS = 10**10


class Setting:
    """The ``watchdog`` of a request."""

    __slots__ = ("after_s", "grace_s")

    def __init__(self, params: Params) -> None:
        """Take *params* apart; raises `Failure`."""
        self.after_s = params.integer("after_ms", 1, MAX_MS) / 1000
        self.grace_s = params.integer("grace_ms", 0, MAX_MS) / 1000
        params.done()


class Watchdog:
    """Calls *bite* with the grace, once, when it was not set again in time."""

    def __init__(self, loop: Loop, bite: Callable[[float], None]) -> None:
        self._loop = loop
        self._bite = bite
        self._timer: Timer | None = None

    def set(self, setting: Setting) -> None:
        """Bite as *setting* says, unless this is called again; once it has bitten, nothing calls it back."""
        if self._timer is not None:
            if not self._timer.pending:
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(setting.after_s, lambda: self._bite(setting.grace_s))
