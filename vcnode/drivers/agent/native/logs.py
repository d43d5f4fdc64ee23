"""The logs of a guest's containers, as they come over one stream; see contracts/guest-protocol.md, Logs."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Literal, Protocol

from vcnode.drivers.agent.native.messages import BadFieldError, is_id
from vcnode.drivers.base import LogRecord

HEADER = struct.Struct(">BBHIQQQ")
KINDS: dict[int, Literal["stdout", "stderr", "end"]] = {1: "stdout", 2: "stderr", 3: "end"}
MAX_RECORD_BYTES = 32 * 1024
_MAX_NUMBER = 1 << 62


class Owner(Protocol):
    """What a feed needs of its session."""

    def check(self) -> None:
        """Raise AgentError when the session is over."""
        ...

    def send_reset(self, stream: int) -> None:
        """Refuse the rest of a stream."""
        ...

    def consumed(self, stream: int, count: int) -> None:
        """Let the guest send more of a stream."""
        ...

    def fail(self, reason: str) -> None:
        """The guest breaks the rules: end the session."""
        ...


class NativeLogFeed:
    """A `LogFeed`. What was not read yet is kept here: at most one window."""

    def __init__(self, owner: Owner, stream: int) -> None:
        self.stream = stream
        self._owner = owner
        self._unread = bytearray()
        self._ended = False
        self._changed = asyncio.Event()

    # -- called by the session ---------------------------------------------------------------------

    def on_data(self, stream: int, data: bytes | memoryview) -> None:
        """Keep it until it is read."""
        if not self._ended:
            self._unread += data
            self.wake()

    def on_eof(self, stream: int) -> None:
        """The guest sends no more."""
        self._ended = True
        self.wake()

    def wake(self) -> None:
        """Let the reader look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    # -- LogFeed -----------------------------------------------------------------------------------

    async def records(self) -> AsyncIterator[Sequence[LogRecord]]:
        """See `LogFeed.records`."""
        while True:
            changed = self._changed
            self._owner.check()
            if self._unread:
                before = len(self._unread)
                try:
                    found = take_records(self._unread)
                except BadFieldError as exc:
                    self._owner.fail(f"The guest sent a log with a bad {exc}.")
                    self._owner.check()
                    return
                taken = before - len(self._unread)
                if found:
                    yield found
                    # Asked for more: what was given is kept now.
                    self._owner.consumed(self.stream, taken)
                    continue
            if self._ended:
                return
            await changed.wait()

    async def close(self) -> None:
        """See `LogFeed.close`."""
        if not self._ended:
            self._ended = True
            self._unread.clear()
            self._owner.send_reset(self.stream)
            self.wake()


def take_records(unread: bytearray) -> list[LogRecord]:
    """Take the whole records off the beginning of *unread*.

    Raises:
        BadFieldError: It holds none.
    """
    found: list[LogRecord] = []
    at = 0
    while len(unread) - at >= HEADER.size:
        kind, name_length, reserved, length, instance, offset, time_ns = HEADER.unpack_from(unread, at)
        if kind not in KINDS or reserved:
            raise BadFieldError("kind")
        if length > MAX_RECORD_BYTES or (length > 0) != (KINDS[kind] != "end"):
            raise BadFieldError("length")
        if max(instance, offset) > _MAX_NUMBER:
            raise BadFieldError("offset")
        data_at = at + HEADER.size + name_length
        if len(unread) < data_at + length:
            break
        name = bytes(unread[at + HEADER.size : data_at]).decode("ascii", "replace")
        if not is_id(name):
            raise BadFieldError("container_id")
        data = bytes(unread[data_at : data_at + length])
        found.append(LogRecord(name, instance, KINDS[kind], offset, time_ns, data))
        at = data_at + length
    del unread[:at]
    return found
