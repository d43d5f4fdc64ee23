"""What main processes have written, kept on the host until it is read: the guest keeps nothing of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

from vcnode.drivers.base import LogPosition, LogRecord

MAX_KEPT_BYTES = 1 << 20
"""Unread output of one container; what is older goes first, and the offsets show it."""
MAX_RECORD_BYTES = 32 * 1024
MAX_BATCH = 64
_RECORD_COST = 128


class Outputs:
    """The outputs of the main processes of one guest."""

    def __init__(self) -> None:
        self._records: dict[str, deque[LogRecord]] = {}
        self._sizes: dict[str, int] = {}
        self._positions: dict[str, LogPosition] = {}
        self._earlier: set[str] = set()
        """Containers of which nobody has said yet how much they had written before."""
        self.changed = asyncio.Event()
        self.followed = False

    def begin(self, container_id: str, instance: int, *, earlier: bool) -> None:
        """A container writes from now on, or goes on with what it has begun in an *earlier* session."""
        self._positions[container_id] = LogPosition(instance, 0)
        if earlier:
            self._earlier.add(container_id)

    def resume(self, known: Mapping[str, LogPosition]) -> None:
        """Count on from what is kept of outputs that have begun in an earlier session."""
        for container_id, kept in known.items():
            here = self._positions.get(container_id)
            if here is None or container_id not in self._earlier or here.instance != kept.instance:
                continue
            self._earlier.discard(container_id)
            self._positions[container_id] = LogPosition(here.instance, here.offset + kept.offset)
            records = self._records.get(container_id, deque())
            for index, record in enumerate(records):
                records[index] = replace(record, offset=record.offset + kept.offset)

    def add(self, container_id: str, kind: str, data: bytes) -> None:
        """A container has written."""
        for at in range(0, len(data), MAX_RECORD_BYTES):
            part = data[at : at + MAX_RECORD_BYTES]
            self._append(container_id, "stderr" if kind == "stderr" else "stdout", part)

    def end(self, container_id: str) -> None:
        """A container has ended."""
        self._append(container_id, "end", b"")

    def take(self) -> list[LogRecord]:
        """Some of what is there, in order for each container."""
        taken: list[LogRecord] = []
        for container_id, records in list(self._records.items()):
            while records and len(taken) < MAX_BATCH:
                record = records.popleft()
                self._sizes[container_id] -= len(record.data) + _RECORD_COST
                taken.append(record)
            if not records:
                del self._records[container_id], self._sizes[container_id]
        return taken

    def forget(self, container_id: str) -> None:
        """A container is deleted; what is unread of it can still be read."""
        self._positions.pop(container_id, None)
        self._earlier.discard(container_id)

    def wake(self) -> None:
        """Let the reader look again."""
        self.changed.set()
        self.changed = asyncio.Event()

    def _append(self, container_id: str, kind: str, data: bytes) -> None:
        position = self._positions.get(container_id)
        if position is None:
            return
        records = self._records.setdefault(container_id, deque())
        size = self._sizes.get(container_id, 0) + len(data) + _RECORD_COST
        records.append(
            LogRecord(container_id, position.instance, kind, position.offset, time.time_ns(), data)  # type: ignore[arg-type]
        )
        while size > MAX_KEPT_BYTES:
            size -= len(records.popleft().data) + _RECORD_COST
        self._sizes[container_id] = size
        self._positions[container_id] = LogPosition(position.instance, position.offset + len(data))
        self.wake()


class HyperLogFeed:
    """A `LogFeed`.

    Args:
        outputs: What is written.
        check: Raises AgentError when the session is over.
    """

    def __init__(self, outputs: Outputs, check: Callable[[], None]) -> None:
        self._outputs = outputs
        self._check = check
        self._closed = False

    async def records(self) -> AsyncIterator[Sequence[LogRecord]]:
        """See `LogFeed.records`."""
        while not self._closed:
            changed = self._outputs.changed
            if found := self._outputs.take():
                yield found
                continue
            self._check()
            await changed.wait()

    async def close(self) -> None:
        """See `LogFeed.close`."""
        if not self._closed:
            self._closed = True
            self._outputs.followed = False
            self._outputs.wake()
