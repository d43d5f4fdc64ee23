"""The asyncio shell of one end of a session: readers, writers, and the task that sends.

Every wait here ends when the session does: readers then see the end of their stream, writers `OverError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from vcnode.errors import VcnodeError
from vcnode.sessions import frames
from vcnode.sessions.endpoint import Dismissed, Ended, Endpoint, Message, Received, Writable
from vcnode.sessions.frames import Channel, FrameError, Parts

MAX_WAITING_MESSAGES = 256
"""Messages of the peer that wait to be read; one that sends more breaks the rules."""
MOST_AT_ONCE = 1 << 20
"""Bytes that are joined for one `Carrier.read`."""
RETRY_S = 0.5
"""Seconds until frames that the bus did not take are sent again."""

Publish = Callable[[Channel, Parts], Awaitable[None]]


class OverError(Exception):
    """The session is over, or this stream of it."""


class _Inbox:
    """What has come of one stream and was not read yet; the window bounds it."""

    __slots__ = ("data", "ended")

    def __init__(self) -> None:
        self.data: deque[memoryview] = deque()
        self.ended = False

    def take(self) -> bytes | memoryview:
        """The first piece, and those that follow while that is little: each costs a turn."""
        if len(self.data) == 1:
            return self.data.popleft()
        taken: list[memoryview] = []
        size = 0
        while self.data and (not taken or size + len(self.data[0]) <= MOST_AT_ONCE):
            taken.append(self.data.popleft())
            size += len(taken[-1])
        return b"".join(taken)


class Carrier:
    """One end of a session.

    Args:
        endpoint: The protocol.
        publish: Sends a frame on one of the session's subjects; raises `VcnodeError` when the bus is away.
    """

    def __init__(self, endpoint: Endpoint, publish: Publish) -> None:
        self.endpoint = endpoint
        self._publish = publish
        self._inboxes: dict[int, _Inbox] = {}
        self._messages: deque[dict[str, Any]] = deque()
        self._messages_ended = False
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self.over: Dismissed | None = None
        """Why the session is over, if the other end said so, or `close` did."""

    @staticmethod
    def now() -> float:
        """The clock of the endpoints, which is that of the event loop."""
        return time.monotonic()

    def open(self, stream: int, start: int = 0) -> None:
        """See `Endpoint.open`."""
        self.endpoint.open(stream, start)
        if self.endpoint.is_receiving(stream):
            self._inboxes[stream] = _Inbox()

    def receive(self, raw: bytes) -> None:
        """Take a frame from the bus; one that is none is dropped."""
        with contextlib.suppress(FrameError):
            for event in self.endpoint.receive(raw, self.now()):
                self._on_event(event)
        self._tell()

    def _on_event(self, event: object) -> None:
        match event:
            case Received(stream, data):
                if (inbox := self._inboxes.get(stream)) is not None:
                    inbox.data.append(data)
            case Ended(stream):
                if stream in (frames.CONTROL_UP, frames.CONTROL_DOWN):
                    self._messages_ended = True
                    self.endpoint.refuse(stream, self.now())
                elif (inbox := self._inboxes.get(stream)) is not None:
                    inbox.ended = True
            case Message(content):
                if len(self._messages) >= MAX_WAITING_MESSAGES:
                    self.close(Dismissed("invalid_argument", "Too many messages came at once."))
                self._messages.append(content)
            case Dismissed():
                self.close(event)
            case Writable():
                pass

    def _tell(self) -> None:
        self._wake.set()
        self._changed.set()
        self._changed = asyncio.Event()

    async def next_change(self) -> None:
        """Wait until anything has come, or the session is over."""
        await self._changed.wait()

    def wake(self) -> None:
        """Let the sending task look: something is to be sent."""
        self._wake.set()

    def probe(self) -> None:
        """Ask the other end at once what it has."""
        self.endpoint.probe_now(self.now())
        self._wake.set()

    # -- streams -----------------------------------------------------------------------------------

    async def read(self, stream: int) -> bytes | memoryview:
        """The next bytes of *stream*; empty at its end, and when the session is over."""
        inbox = self._inboxes.get(stream)
        while inbox is not None:
            if inbox.data:
                data = inbox.take()
                self.endpoint.consumed(stream, len(data), self.now())
                self._wake.set()
                return data
            if inbox.ended:
                self.endpoint.refuse(stream, self.now())
                del self._inboxes[stream]
                self._wake.set()
                break
            if self.over is not None or not self.endpoint.is_receiving(stream):
                break
            await self._changed.wait()
        return b""

    async def read_any(self, streams: tuple[int, ...]) -> tuple[int, bytes | memoryview] | None:
        """The next bytes of one of *streams*; None when all have ended."""
        while True:
            for stream in streams:
                inbox = self._inboxes.get(stream)
                if inbox is not None and (inbox.data or inbox.ended):
                    data = await self.read(stream)
                    if data:
                        return stream, data
            if self.over is not None or not any(stream in self._inboxes for stream in streams):
                return None
            await self._changed.wait()

    async def write(self, stream: int, data: bytes | memoryview) -> None:
        """Send bytes, waiting for room.

        Raises:
            OverError: The other end takes no more of this stream.
        """
        rest = memoryview(data)
        while rest:
            if self.over is not None or not self.endpoint.is_sending(stream):
                raise OverError
            if room := self.endpoint.room(stream):
                self.endpoint.send(stream, rest[:room], self.now())
                rest = rest[room:]
                self._wake.set()
            else:
                await self._changed.wait()

    def end(self, stream: int) -> None:
        """Send no more. Idempotent."""
        self.endpoint.end(stream, self.now())
        self._wake.set()

    def refuse(self, stream: int) -> None:
        """Take no more of a stream. Idempotent."""
        self.endpoint.refuse(stream, self.now())
        self._inboxes.pop(stream, None)
        self._tell()

    # -- messages ----------------------------------------------------------------------------------

    async def send_message(self, content: Mapping[str, Any]) -> None:
        """Send a reliable message, waiting for room.

        Raises:
            OverError: The session is over.
        """
        while not self.endpoint.message_room:
            if self.over is not None or not self.endpoint.is_sending(self.endpoint.own_control):
                raise OverError
            await self._changed.wait()
        self.endpoint.send_message(content, self.now())
        self._wake.set()

    async def message(self) -> dict[str, Any] | None:
        """The next message; None when no more will come."""
        while not self._messages:
            if self._messages_ended or self.over is not None:
                return None
            await self._changed.wait()
        return self._messages.popleft()

    async def until_consumed(self) -> None:
        """Wait until the other end has all that was sent, or the session is over."""
        while not self.endpoint.all_consumed and self.over is None:
            await self._changed.wait()

    # -- the task ----------------------------------------------------------------------------------

    def close(self, why: Dismissed) -> None:
        """The session is over: wake everybody who waits. Idempotent."""
        if self.over is None:
            self.over = why
        self._tell()

    async def run(self) -> None:
        """Send what is to be sent, until the session is over."""
        while self.over is None:
            self._wake.clear()
            if not self.endpoint.has_outgoing:
                delay = max(0.0, self.endpoint.due_at() - self.now())
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay if self.endpoint.attached else None):
                        await self._wake.wait()
            try:
                for channel, parts in self.endpoint.take_outgoing(self.now()):
                    await self._publish(channel, parts)
            except VcnodeError:
                # Frames may be lost; the other end, or a probe, will tell which.
                await asyncio.sleep(RETRY_S)
                self.endpoint.probe_now(self.now())

    async def flush(self) -> None:
        """Send at once what there is, as far as the bus takes it."""
        with contextlib.suppress(VcnodeError):
            for channel, parts in self.endpoint.take_outgoing(self.now()):
                await self._publish(channel, parts)
