"""The queue of starts: so many pods start at once, others wait by priority, then in the order of arrival."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
from dataclasses import dataclass, field

from vcnode.errors import ResourceExhaustedError

FIRST_GUESS_S = 1.0
"""What a start is thought to take before one was seen."""
SMOOTHING = 0.2
"""Weight of the newest start in the mean of their durations."""


@dataclass(order=True, slots=True)
class Ticket:
    """A place in the queue, or a slot to start in; `StartQueue.leave` gives it back."""

    rank: tuple[int, int]
    """Smaller goes first: the negative priority, and the order of arrival."""
    pod_id: str = field(compare=False)
    granted: asyncio.Event = field(default_factory=asyncio.Event, compare=False)
    """Set once the pod may start."""
    began: float | None = field(default=None, compare=False)
    """Loop time of that."""
    left: bool = field(default=False, compare=False)


class StartQueue:
    """Bounds the pods that start at once.

    Args:
        slots: How many may.
        places: How many more may wait.
    """

    def __init__(self, *, slots: int, places: int) -> None:
        self._slots = slots
        self._places = places
        self._active = 0
        self._waiting: list[Ticket] = []
        self._numbers = itertools.count()
        self._mean_s = FIRST_GUESS_S
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def waiting(self) -> int:
        """How many starts wait."""
        return len(self._waiting)

    def check(self) -> None:
        """See that there is room for one more.

        Raises:
            ResourceExhaustedError: The queue is full; ``details.retry_after_s`` says when to try again.
        """
        if self._active >= self._slots and len(self._waiting) >= self._places:
            retry_after_s = max(1, math.ceil(self._mean_s * (len(self._waiting) + 1) / self._slots))
            raise ResourceExhaustedError(
                f"{len(self._waiting)} starts wait already, which is the limit;"
                f" try again in {retry_after_s} s.",
                limit=self._places,
                retry_after_s=retry_after_s,
            )

    def enter(self, pod_id: str, priority: int) -> Ticket:
        """Join the queue; wait for ``granted`` next, and `leave` in any case. Raises as `check`."""
        self.check()
        self._idle.clear()
        ticket = Ticket((-priority, next(self._numbers)), pod_id)
        bisect.insort(self._waiting, ticket)
        self._admit()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """The start is over, or is not wanted any more. Idempotent."""
        if ticket.left:
            return
        ticket.left = True
        if ticket.began is None:
            self._waiting.remove(ticket)
        else:
            self._active -= 1
            took_s = asyncio.get_running_loop().time() - ticket.began
            self._mean_s += SMOOTHING * (took_s - self._mean_s)
            self._admit()
        if not self._active and not self._waiting:
            self._idle.set()

    def position(self, pod_id: str) -> int | None:
        """Where a pod stands in the queue: 1 is next; None when it does not wait."""
        for index, ticket in enumerate(self._waiting):
            if ticket.pod_id == pod_id:
                return index + 1
        return None

    def expected_wait_s(self) -> float:
        """How long one more start would wait, from what starts took lately; 0 while a slot is free."""
        ahead = self._active + len(self._waiting) + 1 - self._slots
        return max(0, ahead) * self._mean_s / self._slots

    async def idle(self) -> None:
        """Wait until no pod starts, and none waits for it."""
        await self._idle.wait()

    def _admit(self) -> None:
        while self._waiting and self._active < self._slots:
            ticket = self._waiting.pop(0)
            self._active += 1
            ticket.began = asyncio.get_running_loop().time()
            ticket.granted.set()
