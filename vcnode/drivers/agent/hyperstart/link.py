"""One connection to one of the guest's two ports: bytes between a socket and a session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_WRITE_HIGH_BYTES = 256 * 1024


class Link(asyncio.Protocol):
    """Owner of a transport.

    Args:
        on_data: Called with what comes; may send at once.
        on_lost: Called once, with the reason, when the connection has ended for any reason but `abort`.
    """

    def __init__(self, on_data: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self._on_data = on_data
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._over = False
        self._held = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone = asyncio.Event()

    # -- for the session ---------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send; nothing once it is over. Whoever sends a lot waits for `writable`."""
        if data and not self._over and self._transport is not None:
            self._transport.write(data)

    async def writable(self) -> None:
        """Wait until the socket takes more, or the link is over."""
        while not self._writable.is_set():
            await self._writable.wait()

    def hold(self, held: bool) -> None:
        """Read no more for now, or again: what is not read waits in the guest."""
        if held is self._held or self._over or self._transport is None:
            return
        self._held = held
        if held:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def fail(self, reason: str) -> None:
        """End the connection at once and say why. Idempotent."""
        if not self._over:
            self.abort()
            self._on_lost(reason)

    def abort(self) -> None:
        """End the connection at once, silently. Idempotent."""
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

    def data_received(self, data: bytes) -> None:
        """Hand it on."""
        if not self._over:
            self._on_data(data)

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
