"""The queue of what happened in a guest, between a session and its reader."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from vcnode.drivers.base import GuestEvent, SessionLost

MAX_EVENTS = 1_024
"""Events that may wait to be read."""


class EventQueue:
    """Bounded, for one reader; after `end` the reader gets what is left, and then the end."""

    def __init__(self) -> None:
        self._events: deque[GuestEvent] = deque()
        self._ended = False
        self._happened = asyncio.Event()

    def push(self, event: GuestEvent) -> bool:
        """Add *event*; False when the queue is full, and nothing was added."""
        if len(self._events) >= MAX_EVENTS:
            return False
        self._events.append(event)
        self._happened.set()
        return True

    def end(self, lost: SessionLost | None = None) -> None:
        """Nothing more comes but *lost*, for which there is always room. Only the first end counts."""
        if not self._ended:
            self._ended = True
            if lost is not None:
                self._events.append(lost)
            self._happened.set()

    async def read(self) -> AsyncIterator[GuestEvent]:
        """Events as they come, until the end."""
        while True:
            while self._events:
                yield self._events.popleft()
            if self._ended:
                return
            self._happened.clear()
            await self._happened.wait()
