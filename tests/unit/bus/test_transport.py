"""vcnode.bus.transport on a plain server: bytes in order, lines, pressure both ways, and ends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlparse

import pytest

from vcnode.bus.transport import ThriftyTransport

LIMIT = 64 * 1024
Ends = tuple[ThriftyTransport, asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected() -> AsyncIterator[Ends]:
    """The transport, and the server's end of its connection."""
    accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await accepted.put((reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    transport = ThriftyTransport()
    assert not transport
    async with server:
        await transport.connect(urlparse(f"nats://127.0.0.1:{port}"), LIMIT, 5)
        reader, writer = await accepted.get()
        try:
            yield transport, reader, writer
        finally:
            transport.close()
            for each in writers:
                each.close()
            await asyncio.wait_for(transport.wait_closed(), 5)


async def test_lines_and_what_comes_after_them() -> None:
    async with connected() as (transport, _, writer):
        assert transport
        reading = asyncio.ensure_future(transport.readline())
        for part in (b"INFO ", b"{}\r", b"\nPONG\r\n", b"rest"):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        assert await reading == b"INFO {}\r\n"
        assert await transport.readline() == b"PONG\r\n"
        assert await transport.read(1) == b"rest"
        writer.write(b"half a li")
        writer.close()
        assert await transport.readline() == b"half a li"
        assert await transport.read(1) == b""
        assert transport.at_eof()


async def test_a_line_without_an_end_is_refused() -> None:
    async with connected() as (transport, _, writer):
        writer.write(b"x" * (3 * LIMIT))
        with pytest.raises(ValueError, match="too long"):
            await asyncio.wait_for(transport.readline(), 5)


async def test_who_does_not_read_stops_the_sender_and_loses_nothing() -> None:
    sent = os.urandom(32 << 20)
    async with connected() as (transport, _, writer):
        writer.write(sent)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.3)
        assert transport._wire is not None
        assert transport._wire._waiting_bytes <= 2 * LIMIT + 256 * 1024  # what one read of asyncio gives
        got = bytearray()
        while len(got) < len(sent):
            got += await asyncio.wait_for(transport.read(1), 5)
        assert got == sent


async def test_drain_waits_for_a_server_that_does_not_read() -> None:
    async with connected() as (transport, reader, _):
        transport.writelines([bytes(16 << 20), b"end"])
        draining = asyncio.ensure_future(transport.drain())
        await asyncio.wait({draining}, timeout=0.2)
        assert not draining.done()
        assert (await asyncio.wait_for(reader.readexactly((16 << 20) + 3), 10))[-3:] == b"end"
        await asyncio.wait_for(draining, 5)


async def test_a_connection_that_breaks_says_so_to_both_sides() -> None:
    async with connected() as (transport, _, writer):
        reading = asyncio.ensure_future(transport.read(1))
        await asyncio.sleep(0)
        writer.transport.abort()
        await asyncio.wait({reading}, timeout=5)
        assert reading.exception() is not None or reading.result() == b""
        await asyncio.wait_for(transport.wait_closed(), 5)
        assert transport.at_eof()
        with pytest.raises(ConnectionError):
            await transport.drain()


async def test_it_connects_again() -> None:
    async with connected() as (transport, _, first):
        first.close()
        assert await transport.read(1) == b""
        async with connected() as (other, _, _):
            assert other._wire is not None
            port = other._wire.transport.get_extra_info("peername")[1]
            await transport.connect(urlparse(f"nats://127.0.0.1:{port}"), LIMIT, 5)
            assert not transport.at_eof()
            transport.close()
            await asyncio.wait_for(transport.wait_closed(), 5)


async def test_nobody_there_is_an_error() -> None:
    transport = ThriftyTransport()
    with pytest.raises(ConnectionRefusedError):
        await transport.connect(urlparse("nats://127.0.0.1:1"), LIMIT, 5)
    assert transport.at_eof()
    with pytest.raises(ConnectionError):
        transport.write(b"x")
