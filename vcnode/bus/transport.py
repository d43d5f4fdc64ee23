"""nats-py's TCP transport without its copies: what was received is handed on as it came.

asyncio's StreamReader, which nats-py uses, puts what comes into one buffer and takes it out again.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Sequence
from urllib.parse import ParseResult

import nats.aio.client
from nats.aio.transport import Transport

DEFAULT_PORT = 4222


class ThriftyTransport(Transport):
    """One connection at a time, as `Transport` says; `connect` begins anew."""

    def __init__(self) -> None:
        self._wire: _Wire | None = None

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        """Connect. Raises OSError, TimeoutError."""
        loop = asyncio.get_running_loop()
        wire = _Wire(buffer_size)
        async with asyncio.timeout(connect_timeout):
            await loop.create_connection(lambda: wire, uri.hostname or "localhost", uri.port or DEFAULT_PORT)
        self._wire = wire

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        """Begin TLS on the connection. Raises OSError, TimeoutError."""
        wire = self._connected
        name = uri if isinstance(uri, str) else uri.hostname
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(connect_timeout):
            encrypted = await loop.start_tls(wire.transport, wire, ssl_context, server_hostname=name)
        if encrypted is None:  # it was closed meanwhile
            raise ConnectionResetError("The connection ended while TLS began.")
        wire.transport = encrypted

    @property
    def _connected(self) -> _Wire:
        if self._wire is None:
            raise ConnectionError("There is no connection yet.")
        return self._wire

    def write(self, payload: bytes) -> None:
        """Send, without waiting."""
        self._connected.transport.write(payload)

    def writelines(self, payload: Sequence[bytes]) -> None:
        """Send, without waiting."""
        self._connected.transport.writelines(payload)

    async def read(self, buffer_size: int) -> bytes:
        """What came at once, whatever *buffer_size* says; nothing at the end. Raises OSError."""
        return await self._connected.read()

    async def readline(self) -> bytes:
        """One line; what there is of it at the end. Raises OSError, and ValueError when it is too long."""
        return await self._connected.readline()

    async def drain(self) -> None:
        """Wait until the network has taken most of what was sent. Raises OSError."""
        await self._connected.drain()

    async def wait_closed(self) -> None:
        """Wait for the end of the connection."""
        if self._wire is not None:
            await self._wire.closed.wait()

    def close(self) -> None:
        """End the connection once all is sent."""
        if self._wire is not None:
            self._wire.transport.close()

    def at_eof(self) -> bool:
        """Whether nothing more will come."""
        return self._wire is None or self._wire.at_eof

    def __bool__(self) -> bool:
        """Whether there is, or was, a connection."""
        return self._wire is not None


class _Wire(asyncio.Protocol):
    """A connection; *limit* is half of what may wait to be read, in bytes."""

    transport: asyncio.Transport

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._paused = False
        self._ended = False
        self._error: Exception | None = None
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._waiting_bytes += len(data)
        self._readable.set()
        if self._waiting_bytes > 2 * self._limit and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def eof_received(self) -> None:
        self._ended = True
        self._readable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._error = exc
        for event in (self._readable, self._writable, self.closed):
            event.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    @property
    def at_eof(self) -> bool:
        return self._ended and not self._chunks

    async def read(self) -> bytes:
        await self._readable.wait()
        if not self._chunks:
            if self._error is not None:
                raise self._error
            return b""
        data = self._chunks.popleft()
        self._waiting_bytes -= len(data)
        if not (self._chunks or self._ended):
            self._readable.clear()
        if self._paused and self._waiting_bytes <= self._limit:
            self._paused = False
            self.transport.resume_reading()
        return data

    async def readline(self) -> bytes:
        line = b""
        while chunk := await self.read():
            begin, end, rest = chunk.partition(b"\n")
            line += begin + end
            if rest:
                self._chunks.appendleft(rest)
                self._waiting_bytes += len(rest)
                self._readable.set()
            if end:
                break
            if len(line) > self._limit:
                raise ValueError("A line is too long.")
        return line

    async def drain(self) -> None:
        await self._writable.wait()
        if self.closed.is_set():
            raise self._error or ConnectionResetError("The connection was closed.")


def install() -> None:
    """Have nats-py use it for all connections of this process from now on."""
    setattr(nats.aio.client, "TcpTransport", ThriftyTransport)  # noqa: B010 -- it is not exported
