"""What containers write: kept in a ring for each, and sent to the host in order.

::

    pipes of a container  ->  Log: not sent  ->  Log: sent  ->  credited by the host: forgotten
                                    \\______________/
                                     LOG_BYTES at most: the oldest make room

A container is never held up by a host that is slow or away. What a full ring has dropped the host sees from
the offsets, which count every byte that the container ever wrote. Credit means that the host has kept what it
got; so a session that ends loses nothing that is in the ring still.
"""

from __future__ import annotations

import os
import struct
import time
from collections import deque

from vcnode.guest.agent.failures import FAILED_PRECONDITION, Failure
from vcnode.guest.agent.loop import IN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from vcnode.guest.agent.loop import Loop
    from vcnode.guest.agent.port import Port

    class Listeners(Protocol):
        """Who hears a container besides its log."""

        @property
        def are_full(self) -> bool:
            """Whether one of them takes no more for now."""

        def feed(self, kind: int, data: bytes) -> None:
            """Output of the container."""


STDOUT, STDERR, END = 1, 2, 3
"""Kinds of records; see contracts/guest-protocol.md, Logs."""
HEADER = struct.Struct(">BBHIQQQ")
LOG_BYTES = 256 * 1024
"""Most bytes kept for a container, with `RECORD_COST` for each record."""
RECORD_COST = 64
JOIN_NS = 10_000_000
"""Output of one stream within this time becomes one record."""
MAX_RECORD_BYTES = 32 * 1024
READ_BYTES = 64 * 1024
PACE_S = 0.005
"""A pipe that was just read is read again after this time: a flood costs its writer time, not the guest."""
_MOST_DRAINED = 64
"""Reads of what is left in a pipe when the container has ended: a pipe may be as large as 1 MiB."""


class Record:
    """One piece of output, or the end of it."""

    __slots__ = ("data", "kind", "offset", "time_ns")

    def __init__(self, kind: int, offset: int, time_ns: int, data: bytearray) -> None:
        self.kind = kind
        self.offset = offset
        self.time_ns = time_ns
        self.data = data


class Log:
    """The output of one container."""

    def __init__(self, container_id: str, feed: Feed) -> None:
        self.container_id = container_id
        self.instance = 0
        """Tells this log from others of a container of the same id; 0 until something is in it."""
        self.end_offset = 0
        """How many bytes were ever written."""
        self._feed = feed
        self._sent: deque[Record] = deque()
        self._unsent: deque[Record] = deque()
        self._held = 0

    def add(self, kind: int, data: bytes) -> None:
        """Append output, or with `END` and no data the note that a run of the container has ended."""
        now_ns = time.time_ns()
        if not self.instance:
            # No random number: clones of one template would have the same.
            self.instance = now_ns // 1000
        last = self._unsent[-1] if self._unsent else None
        if (
            last is not None
            and kind == last.kind != END
            and 0 <= now_ns - last.time_ns < JOIN_NS
            and len(last.data) + len(data) <= MAX_RECORD_BYTES
        ):
            last.data += data
            self._held += len(data)
        else:
            for start in range(0, len(data) or 1, MAX_RECORD_BYTES):
                part = bytearray(data[start : start + MAX_RECORD_BYTES])
                self._unsent.append(Record(kind, self.end_offset + start, now_ns, part))
                self._held += len(part) + RECORD_COST
        self.end_offset += len(data)
        while self._held > LOG_BYTES:
            oldest = self._sent.popleft() if self._sent else self._unsent.popleft()
            self._held -= len(oldest.data) + RECORD_COST
        self._feed.changed(self)

    def take(self) -> Record | None:
        """The next record to be sent."""
        if not self._unsent:
            return None
        record = self._unsent.popleft()
        self._sent.append(record)
        return record

    def acknowledge(self, record: Record) -> None:
        """The host keeps this record now, and all before it."""
        while self._sent and self._sent[0].offset <= record.offset:
            held = self._sent.popleft()
            self._held -= len(held.data) + RECORD_COST
            if held is record:
                return

    def rewind(self, instance: int, offset: int) -> None:
        """A new session begins, whose host has everything before *offset* of the log *instance*."""
        self._unsent.extendleft(reversed(self._sent))
        self._sent.clear()
        if instance != self.instance:
            return
        while self._unsent and self._unsent[0].offset + len(self._unsent[0].data) <= offset:
            if self._unsent[0].kind == END and self._unsent[0].offset == offset:
                return  # whether the host has seen this note it will know
            held = self._unsent.popleft()
            self._held -= len(held.data) + RECORD_COST

    @property
    def waits(self) -> bool:
        """Whether something is to be sent."""
        return bool(self._unsent)


class Feed:
    """Sends all logs on one stream, one record of each log after the other."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._stream = 0
        self._window = 0
        self._sent = 0
        self._waiting: dict[Log, None] = {}
        self._pending = memoryview(b"")
        self._in_flight: deque[tuple[int, Log, Record]] = deque()

    def follow(self, stream: int, logs: list[Log], known: dict[str, tuple[int, int]]) -> None:
        """Begin to send.

        Args:
            stream: Of the host's choice.
            logs: All there are.
            known: Instance and offset that the host has kept, by container.

        Raises:
            Failure: ``failed_precondition``, ``invalid_argument``.
        """
        if self._stream:
            raise Failure(FAILED_PRECONDITION, "The logs are followed in this session already.")
        self._port.open_stream(stream, sending=True)
        self._stream, self._sent = stream, 0
        self._window = self._port.credit(stream)
        for log in logs:
            log.rewind(*known.get(log.container_id, (0, 0)))
            if log.waits:
                self._waiting[log] = None

    def changed(self, log: Log) -> None:
        """There is something to send."""
        self._waiting[log] = None
        self.push()

    def forget(self, log: Log) -> None:
        """The container is deleted."""
        self._waiting.pop(log, None)

    def push(self) -> None:
        """Send what may be sent now; to be called whenever that may have become more."""
        while self._stream and (room := self._port.room(self._stream)) > 0:
            if not self._pending and not self._next():
                return
            part = self._pending[:room]
            self._port.send_data(self._stream, bytes(part))
            self._pending = self._pending[room:]

    def _next(self) -> bool:
        """Encode the next record, if there is one."""
        while self._waiting:
            log = next(iter(self._waiting))
            del self._waiting[log]
            record = log.take()
            if record is None:
                continue
            if log.waits:
                self._waiting[log] = None  # behind the others
            name = log.container_id.encode()
            head = HEADER.pack(
                record.kind, len(name), 0, len(record.data), log.instance, record.offset, record.time_ns
            )
            self._pending = memoryview(head + name + record.data)
            self._sent += len(self._pending)
            self._in_flight.append((self._sent, log, record))
            return True
        return False

    def credit(self, stream: int) -> None:
        """The host has kept more."""
        if stream != self._stream:
            return
        used = self._window - self._port.credit(stream)
        kept = self._sent - len(self._pending) - used
        while self._in_flight and self._in_flight[0][0] <= kept:
            _, log, record = self._in_flight.popleft()
            log.acknowledge(record)
        self.push()

    def reset(self, stream: int) -> None:
        """The host wants no more."""
        if stream == self._stream:
            self.end_session()

    def end_session(self) -> None:
        """Nobody listens. What was not credited is sent again to who follows next."""
        self._stream = 0
        self._pending = memoryview(b"")
        self._in_flight.clear()


class Pipe:
    """The reading end of a container's stdout or stderr. It may outlive the main process.

    Args:
        loop: Where to wait.
        fd: A pipe, or the other end of a terminal; closed here.
        log: Where what comes is kept.
        kind: Which it is.
        listeners: They get what comes, too, and can hold the writer up.
    """

    def __init__(self, loop: Loop, fd: int, log: Log, kind: int, listeners: Listeners | None = None) -> None:
        self._listeners = listeners
        self._held_up = False
        self._loop = loop
        self._fd = fd
        self._log = log
        self._kind = kind
        self._read_at = 0.0
        loop.watch(fd, IN, self._on_ready)

    def _on_ready(self, _events: int) -> None:
        if self._fd >= 0 and self._listeners is not None and self._listeners.are_full:
            self._loop.unwatch(self._fd)
            self._held_up = True
            return
        if self._fd < 0 or not self._read():
            return
        now = time.monotonic()
        if now - self._read_at < PACE_S:
            self._loop.unwatch(self._fd)
            self._loop.call_later(PACE_S, self._go_on)
        self._read_at = now

    def _go_on(self) -> None:
        if self._fd >= 0:
            self._loop.watch(self._fd, IN, self._on_ready)

    def resume(self) -> None:
        """Those who held it up have room again."""
        if self._held_up:
            self._held_up = False
            self._go_on()

    @property
    def fd(self) -> int:
        """The descriptor; -1 when closed."""
        return self._fd

    def close(self) -> None:
        """Read no more. Idempotent."""
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> bool:
        """Keep what is there; whether there was anything."""
        try:
            data = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""  # a terminal that has hung up
        if data:
            self._log.add(self._kind, data)
            if self._listeners is not None:
                self._listeners.feed(self._kind, data)
            return True
        self.close()
        return False

    def drain(self) -> None:
        """Keep what is in the pipe: its writer has ended."""
        for _ in range(_MOST_DRAINED):
            if self._fd < 0 or not self._read():
                return
