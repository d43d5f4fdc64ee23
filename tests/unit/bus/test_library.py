"""What is mended of nats-py, without a server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import nats.errors
import pytest

from vcnode.bus.library import SturdyClient, uncancelled


async def test_a_client_that_never_connected_can_be_closed() -> None:
    await SturdyClient(require_tls=False).close()


@contextlib.asynccontextmanager
async def small_server() -> AsyncIterator[tuple[str, list[bytes]]]:
    """The address of a server that answers pings, and the lines that it was sent after the first of them."""
    said: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.11.0","max_payload":1048576,"headers":true}\r\n')
        with contextlib.closing(writer):
            assert (await reader.readline()).startswith(b"CONNECT ")
            assert await reader.readline() == b"PING\r\n"
            writer.write(b"PONG\r\n")
            while line := await reader.readline():
                said.append(line)
                if line == b"PING\r\n":
                    writer.write(b"PONG\r\n")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"nats://{host}:{port}", said


async def test_a_flush_ends_when_all_that_was_written_before_has_arrived() -> None:
    async with small_server() as (url, said):
        client = SturdyClient(require_tls=False)
        await client.connect(url, allow_reconnect=False)
        await client.subscribe("a")
        await client.publish("b", b"x")
        await client.flush()
        assert [line.split()[0] for line in said] == [b"SUB", b"PUB", b"x", b"PING"]
        await client.close()


async def test_the_reply_to_a_flush_that_gave_up_harms_nothing() -> None:
    async with small_server() as (url, said):
        client = SturdyClient(require_tls=False)
        await client.connect(url, allow_reconnect=False)
        given_up = asyncio.ensure_future(client.flush())
        await asyncio.sleep(0)  # its PING is on its way
        given_up.cancel()
        await asyncio.wait([given_up])
        await client.flush()
        await client.flush()
        assert said == [b"PING\r\n"] * 3
        assert client.is_connected
        await client.close()


async def cancelled_while(work: object) -> asyncio.Task[None]:
    """A task that awaits `uncancelled(work)` and is cancelled meanwhile."""

    async def run() -> None:
        await uncancelled(work)  # type: ignore[arg-type]

    task = asyncio.ensure_future(run())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    return task


async def swallow() -> int:
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
    return 1


async def replace() -> int:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError as exc:
        raise nats.errors.TimeoutError from exc
    return 1


@pytest.mark.parametrize("work", [swallow, replace])
async def test_a_cancellation_comes_out_whatever_the_library_makes_of_it(work: object) -> None:
    assert (await cancelled_while(work())).cancelled()  # type: ignore[operator]


async def test_results_and_errors_pass() -> None:
    async def give() -> int:
        return 3

    async def fail() -> int:
        raise nats.errors.TimeoutError

    assert await uncancelled(give()) == 3
    with pytest.raises(nats.errors.TimeoutError):
        await uncancelled(fail())


async def test_a_time_limit_still_ends_a_call_that_swallows_its_cancellation() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await uncancelled(swallow())
