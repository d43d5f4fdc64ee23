"""What the containers of a mock guest write, in rings as in a real one."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Literal

from vcnode.drivers.base import LogPosition, LogRecord

LOG_BYTES = 256 * 1024
"""Most bytes kept for a container, with `RECORD_COST` for each record."""
RECORD_COST = 64
MAX_RECORD_BYTES = 32 * 1024


class MockLog:
    """The output of one container; *changed* is called when there is more."""

    def __init__(self, container_id: str, changed: Callable[[], None]) -> None:
        self.container_id = container_id
        self.records: deque[LogRecord] = deque()
        self._changed = changed
        self._instance = 0
        self._end_offset = 0
        self._held = 0

    def add(self, kind: Literal["stdout", "stderr", "end"], data: bytes) -> None:
        """Append output, or the note that the main process has ended."""
        now_ns = time.time_ns()
        self._instance = self._instance or now_ns // 1000
        for start in range(0, len(data) or 1, MAX_RECORD_BYTES):
            part = data[start : start + MAX_RECORD_BYTES]
            self.records.append(
                LogRecord(self.container_id, self._instance, kind, self._end_offset, now_ns, part)
            )
            self._end_offset += len(part)
            self._held += len(part) + RECORD_COST
        while self._held > LOG_BYTES:
            self._held -= len(self.records.popleft().data) + RECORD_COST
        self._changed()


class MockLogFeed:
    """A `LogFeed`. Unlike a real guest, a mock one keeps what is acknowledged, while there is room."""

    def __init__(
        self,
        logs: Callable[[], Sequence[MockLog]],
        known: Mapping[str, LogPosition],
        check: Callable[[], None],
    ) -> None:
        self._logs = logs
        self._known = dict(known)
        self._ends: dict[str, tuple[int, int]] = {}
        self._check = check
        self.closed = False
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Let the reader look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def records(self) -> AsyncIterator[Sequence[LogRecord]]:
        """See `LogFeed.records`."""
        while not self.closed:
            changed = self._changed
            self._check()
            if found := [record for log in self._logs() for record in self._new(log)]:
                yield found
            else:
                await changed.wait()

    def _new(self, log: MockLog) -> list[LogRecord]:
        found = []
        for record in log.records:
            known = self._known.get(log.container_id)
            if known is not None and known.instance == record.instance:
                end = (record.instance, record.offset)
                if record.kind == "end":
                    if record.offset < known.offset or self._ends.get(log.container_id) == end:
                        continue
                    self._ends[log.container_id] = end
                elif record.offset + len(record.data) <= known.offset:
                    continue
            found.append(record)
            self._known[log.container_id] = LogPosition(record.instance, record.offset + len(record.data))
        return found

    async def close(self) -> None:
        """See `LogFeed.close`."""
        self.closed = True
        self.wake()
