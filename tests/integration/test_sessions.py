"""Sessions through a real NATS server: a node with mock guests, the SDK, and connections that break."""

# ruff: noqa: SIM117 -- the node is to outlive what is inside, and to be seen to
from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.integration.conftest import mock_settings
from tests.support.nats import NatsServer
from vcnode.client import Client, NodeClient
from vcnode.errors import AbortedError, FailedPreconditionError, NotFoundError, VcnodeError
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec
from vcnode.node import running

pytestmark = [pytest.mark.nats, pytest.mark.timeout(60)]

EVERY_BYTE = bytes(range(256)) * 4000
WAIT_S = 20.0
SLEEP = Cmd(args=("sleep", "infinity"))


class Proxy:
    """A TCP proxy in front of NATS whose connections can be cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._writers: set[asyncio.StreamWriter] = set()
        self.cuts = 0
        self.url = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, here}

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            sink.transport.abort()

        try:
            await asyncio.gather(pump(reader, here), pump(there, writer))
        finally:
            self._writers -= {writer, here}
            for one in (writer, here):
                one.transport.abort()

    def cut(self) -> None:
        """End all connections at once, with whatever is in them."""
        self.cuts += 1
        for writer in self._writers:
            writer.transport.abort()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            self.url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self
        finally:
            server.close()
            self.cut()
            async with asyncio.timeout(WAIT_S):
                while self._writers:  # noqa: ASYNC110 -- they end in a turn or two
                    await asyncio.sleep(0)


@asynccontextmanager
async def a_node(url: str, directory: Path, *, client_url: str = "") -> AsyncIterator[NodeClient]:
    """A node with mock guests and a running container ``pod/main``, seen by a client."""
    async with running(mock_settings(directory, url)) as node:
        await node.connection.wait_connected()
        async with await Client.connect(client_url or url) as client:
            found = client.node("n1")
            main = ContainerSpec(
                id="main", rootfs=str(directory / "roots" / "a"), cmd=Cmd(args=("sleep", "infinity"))
            )
            await found.pod_run(PodSpec(id="pod", containers=(main,)))
            yield found


async def no_sessions(node: NodeClient) -> None:
    async with asyncio.timeout(WAIT_S):
        while (await node.session_list()).sessions:  # noqa: ASYNC110 -- nothing announces it to clients
            await asyncio.sleep(0.05)


async def echo(node: NodeClient, data: bytes) -> bytes:
    """What ``cat`` makes of *data*."""
    async with node.exec_stream("pod", "main", ["cat"]) as process:

        async def feed() -> None:
            await process.stdin.write(data)
            await process.stdin.close()

        async with asyncio.TaskGroup() as group:
            group.create_task(feed())
            got = bytearray()
            async for name, chunk in process.output():
                assert name == "stdout"
                got += chunk
        assert await process.wait() == 0
    return bytes(got)


async def test_every_byte_goes_through_and_so_does_the_exit_code(
    nats_server: NatsServer, short_dir: Path
) -> None:
    async with a_node(nats_server.url, short_dir) as node:
        assert await echo(node, EVERY_BYTE) == EVERY_BYTE
        async with node.exec_stream("pod", "main", ["sh", "-c", "echo out; echo err >&2; exit 7"]) as process:
            got = [item async for item in process.output()]
            assert sorted(got) == [("stderr", b"err\n"), ("stdout", b"out\n")]
            assert await process.wait() == 7
        await no_sessions(node)


async def test_fifty_sessions_at_once_do_not_mix(nats_server: NatsServer, short_dir: Path) -> None:
    async with a_node(nats_server.url, short_dir) as node:
        sent = [bytes([number]) * 50_000 for number in range(50)]
        got = await asyncio.gather(*(echo(node, data) for data in sent))
        assert got == sent


async def test_one_that_does_not_read_holds_up_nobody_else(nats_server: NatsServer, short_dir: Path) -> None:
    async with a_node(nats_server.url, short_dir) as node:
        async with node.exec_stream("pod", "main", ["cat"]) as slow:
            writing = asyncio.ensure_future(slow.stdin.write(bytes(16 << 20)))
            assert await echo(node, EVERY_BYTE) == EVERY_BYTE
            assert not writing.done()
            total = 0
            async for _, chunk in slow.output():
                total += len(chunk)
                if total == 16 << 20:
                    await slow.stdin.close()
            assert await slow.wait() == 0
            await writing


@pytest.mark.parametrize("side", ["client", "node"])
async def test_connections_that_break_lose_nothing(
    side: str, nats_server: NatsServer, short_dir: Path
) -> None:
    async with Proxy(int(nats_server.url.rpartition(":")[2])).running() as proxy:
        url = proxy.url if side == "node" else nats_server.url
        client_url = proxy.url if side == "client" else nats_server.url
        async with a_node(url, short_dir, client_url=client_url) as node:
            data = EVERY_BYTE * 4
            async with node.exec_stream("pod", "main", ["cat"]) as process:

                async def feed() -> None:
                    for at in range(0, len(data), 100_000):
                        await process.stdin.write(data[at : at + 100_000])
                    await process.stdin.close()

                async with asyncio.TaskGroup() as group:
                    group.create_task(feed())
                    got = bytearray()
                    async for _, chunk in process.output():
                        got += chunk
                        if len(got) > len(data) * (proxy.cuts + 1) // 3 and proxy.cuts < 2:
                            proxy.cut()
                assert await process.wait() == 0
            assert got == data
            assert proxy.cuts == 2


async def test_a_client_that_vanishes_takes_its_process_along(
    nats_server: NatsServer, short_dir: Path
) -> None:
    async with a_node(nats_server.url, short_dir) as node:
        async with await Client.connect(nats_server.url) as other:
            stream = other.node("n1").exec_stream("pod", "main", ["cat"], lost_after_s=5)
            process = await stream.__aenter__()
            await other.close()  # without a word to the node
            stream._tasks and await stream._tasks.close()
        assert len((await node.session_list()).sessions) == 1
        await no_sessions(node)
        with pytest.raises(NotFoundError, match="Nothing was heard of its client for 5 s"):
            async with node.resume_stream(process.session_id):
                pass


async def test_another_client_goes_on_where_one_has_detached(
    nats_server: NatsServer, short_dir: Path
) -> None:
    async with a_node(nats_server.url, short_dir) as node:
        async with node.exec_stream("pod", "main", ["cat"]) as process:
            await process.stdin.write(b"one")
            assert await anext(process.output()) == ("stdout", b"one")
            await process.stdin.write(b"two")
            await process.detach()
        [kept] = (await node.session_list()).sessions
        assert not kept.attached
        async with await Client.connect(nats_server.url) as other:
            async with other.node("n1").resume_stream(process.session_id) as again:
                await again.stdin.write(b"three")
                await again.stdin.close()
                assert b"".join([chunk async for _, chunk in again.output()]) == b"twothree"
                assert await again.wait() == 0
        await no_sessions(node)


async def test_who_loses_a_session_to_another_is_told(nats_server: NatsServer, short_dir: Path) -> None:
    async with a_node(nats_server.url, short_dir) as node:
        async with node.exec_stream("pod", "main", ["cat"]) as first:
            async with node.resume_stream(first.session_id) as second:
                with pytest.raises(AbortedError, match="Another client has resumed"):
                    async for _ in first.output():
                        pass
                await second.stdin.close()
                assert await second.wait() == 0


async def test_leaving_early_kills_the_process(nats_server: NatsServer, short_dir: Path) -> None:
    async with a_node(nats_server.url, short_dir) as node:
        async with node.exec_stream("pod", "main", ["sleep", "infinity"]):
            pass
        await no_sessions(node)


async def test_closing_a_session_tells_its_client(nats_server: NatsServer, short_dir: Path) -> None:
    async with a_node(nats_server.url, short_dir) as node:
        async with node.exec_stream("pod", "main", ["sleep", "infinity"]) as process:
            assert (await node.session_close(process.session_id)).existed
            assert not (await node.session_close(process.session_id)).existed
            with pytest.raises(AbortedError, match="It was closed"):
                await process.wait()


async def test_a_node_that_stops_tells_its_clients(nats_server: NatsServer, short_dir: Path) -> None:
    async with await Client.connect(nats_server.url) as client, contextlib.AsyncExitStack() as stack:
        async with a_node(nats_server.url, short_dir):
            process = await stack.enter_async_context(
                client.node("n1").exec_stream("pod", "main", ["sleep", "infinity"])
            )
        with pytest.raises(AbortedError, match="node agent is stopping"):
            await process.wait()


async def test_a_session_of_a_node_that_was_killed_ends_with_the_reason(
    nats_server: NatsServer, short_dir: Path
) -> None:
    async with await Client.connect(nats_server.url) as client, contextlib.AsyncExitStack() as stack:
        async with a_node(nats_server.url, short_dir) as node:
            process = await stack.enter_async_context(
                client.node("n1").exec_stream("pod", "main", ["sleep", "infinity"])
            )
            process.info = process.info.model_copy(update={"session_id": "0" * 32})
            subject = "vcnode.io.n1." + "0" * 32 + ".control"  # as if the node knew nothing of it
            process.info = process.info.model_copy(
                update={"subjects": process.info.subjects.model_copy(update={"control": subject})}
            )
            await process._subscribe()
            with pytest.raises(VcnodeError, match="when the node agent is restarted"):
                await process.wait()
            await node.node_ping()


async def test_an_archive_goes_in_and_comes_out(nats_server: NatsServer, short_dir: Path) -> None:
    async with a_node(nats_server.url, short_dir) as node:
        async with node.copy_in("pod", "main", "/srv") as copy:
            await copy.write(EVERY_BYTE)
            await copy.finish()
        async with node.copy_out("pod", "main", "/srv") as out:
            assert b"".join([piece async for piece in out.pieces()]) == EVERY_BYTE
        async with node.copy_out("pod", "main", "/nothing") as out:
            with pytest.raises(NotFoundError, match="/nothing"):
                _ = [piece async for piece in out.pieces()]


async def test_many_connections_share_one_session(nats_server: NatsServer, short_dir: Path) -> None:
    async with a_node(nats_server.url, short_dir) as node, node.forward("pod") as session:

        async def talk(number: int) -> bytes:
            connection = await session.connect(7)
            await connection.write(bytes([number]) * 30_000)
            connection.close_write()
            got = bytearray()
            while data := await connection.read():
                got += data
            connection.close()
            return bytes(got)

        stalled = await session.connect(7)  # nobody reads what comes back
        writing = asyncio.ensure_future(stalled.write(bytes(16 << 20)))
        got = await asyncio.gather(*(talk(number) for number in range(40)))
        assert got == [bytes([number]) * 30_000 for number in range(40)]
        assert not writing.done()
        stalled.close()
        writing.cancel()
        with pytest.raises(FailedPreconditionError, match="refused"):
            await session.connect(8)
        await node.pod_stop("pod")
        with pytest.raises(FailedPreconditionError):
            await session.connect(7)
        await node.pod_start("pod")
        await session.connect(7)
        await node.pod_delete("pod", force=True)
        with pytest.raises(NotFoundError):
            await session.connect(7)
        assert "no pod" in (await session.ended()).message
    assert writing.cancelled()


async def test_attaching_to_a_main_process_ends_with_it(nats_server: NatsServer, short_dir: Path) -> None:
    async with a_node(nats_server.url, short_dir) as node:
        async with node.attach("pod", "main"):
            pass  # detached again
        assert (await node.container_status("pod", "main")).state == "running"
        async with node.attach("pod", "main") as process:
            await process.signal(15)
            assert await process.wait() == 143
        await no_sessions(node)
