"""One connection to a guest's port: bytes between the socket and the codec.

A callback protocol and not a reader task with a stream: data is parsed as it arrives, nothing is queued
before the codec, no task can leak, and a flooding guest gets one read per turn of the loop, like every other
guest. What belongs to a BULK frame is read to where it stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vcnode.guest import protocol

MAX_BEFORE_HELLO = 16 << 20
"""Bytes that may precede the hello. What an earlier session left in the port's queues is far less."""
_WRITE_HIGH_BYTES = 256 * 1024
_READ_BYTES = 64 * 1024


class Link(asyncio.BufferedProtocol):
    """Owner of the transport.

    Args:
        host: The codec of this connection.
        on_event: Called with each event; it may send at once through *host*.
        on_lost: Called once, with the reason, when the connection has ended for any reason but `abort`.
    """

    def __init__(
        self,
        host: protocol.Host,
        on_event: Callable[[protocol.Event], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._host = host
        self._on_event = on_event
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._over = False
        self._before_hello = 0
        self._space = memoryview(bytearray(_READ_BYTES))
        self._in_place = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone = asyncio.Event()

    # -- for the session ---------------------------------------------------------------------------

    @property
    def is_drained(self) -> bool:
        """Whether the socket has taken everything that was written."""
        return self._transport is not None and self._transport.get_write_buffer_size() == 0

    def flush(self) -> None:
        """Write what the codec wants to send."""
        if not self._over and self._transport is not None and (data := self._host.data_to_send()):
            self._transport.write(data)

    async def writable(self) -> None:
        """Wait until the socket takes more, or the link is over. Whoever sends a lot must ask first."""
        while not self._writable.is_set():
            await self._writable.wait()

    def fail(self, reason: str) -> None:
        """End the connection at once and say why. Idempotent."""
        if not self._over:
            self.abort()
            self._on_lost(reason)

    def abort(self) -> None:
        """End the connection at once, silently; what was not sent is dropped. Idempotent."""
        self._over = True
        self._writable.set()
        if self._transport is not None:
            self._transport.abort()

    async def gone(self) -> None:
        """Wait until the socket is closed, after `abort` or `fail`."""
        if self._transport is not None:
            await self._gone.wait()

    # -- for asyncio -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("A link needs a stream transport.")
        self._transport = transport
        transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        if self._over:
            transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where to read to."""
        space = self._host.bulk_space()
        self._in_place = space is not None
        return self._space if space is None else space

    def buffer_updated(self, nbytes: int) -> None:
        """Parse, act, and send what that led to."""
        if self._over:
            return
        if not self._host.established:
            self._before_hello += nbytes
            if self._before_hello > MAX_BEFORE_HELLO:
                self.fail("The guest sent too much before its hello.")
                return
        host = self._host
        received = (
            host.bulk_received if self._in_place else lambda count: host.receive_data(self._space[:count])
        )
        try:
            for event in received(nbytes):
                self._on_event(event)
                if self._over:
                    return
        except protocol.ProtocolError as exc:
            self.fail(f"The guest broke the protocol: {exc}.")
            return
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed: by us, by QEMU's end, or after an error."""
        self._gone.set()
        self.fail("The connection to the guest's port was closed.")

    def pause_writing(self) -> None:
        """The socket takes no more for now."""
        if not self._over:
            self._writable.clear()

    def resume_writing(self) -> None:
        """The socket takes more."""
        self._writable.set()
