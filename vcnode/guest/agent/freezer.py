"""Freezing a container's processes: cgroup v2's freezer, which takes its time and says when it is done.

Source: Documentation/admin-guide/cgroup-v2.rst, cgroup.freeze and cgroup.events. A frozen process can be
killed; other signals wait until it is thawed.
"""

from __future__ import annotations

import os
import select

from vcnode.guest.agent.failures import INTERNAL, Failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vcnode.guest.agent.cgroups import Cgroup
    from vcnode.guest.agent.loop import Loop

FREEZE_LIMIT_S = 5.0
"""How long processes may take to stop: one that waits for a disk does not stop before it has it."""


class Freezing:
    """One attempt to freeze; *done* is called once, with None or with why not. Then everything is thawed.

    Raises:
        OSError: The group is gone.
    """

    def __init__(self, loop: Loop, cgroup: Cgroup, done: Callable[[Failure | None], None]) -> None:
        self._loop = loop
        self._cgroup = cgroup
        self._done = done
        self._fd = os.open(f"{cgroup.path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        self._limit = loop.call_later(FREEZE_LIMIT_S, self._too_late)
        loop.watch(self._fd, select.EPOLLPRI, self._look)
        cgroup.freeze()
        self._look(0)

    @property
    def pending(self) -> bool:
        """Whether it is not done yet."""
        return self._fd >= 0

    def _look(self, _events: int) -> None:
        # Reading it is what makes the kernel tell of the next change.
        if self._fd >= 0 and b"frozen 1" in os.pread(self._fd, 256, 0):
            self._end(None)

    def _too_late(self) -> None:
        self.cancel("Its processes did not stop in time.")

    def cancel(self, reason: str) -> None:
        """Give up and thaw. Nothing once it is done."""
        if self._fd >= 0:
            self._cgroup.thaw()
            self._end(Failure(INTERNAL, reason))

    def _end(self, failure: Failure | None) -> None:
        self._limit.cancel()
        self._loop.unwatch(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._done(failure)
