"""A chaos run lost an event: what nats-py kept over a reconnect was stored behind what had been lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import nats
import pytest

from tests.integration.nats_node import WAIT_S, running
from tests.support.nats import NatsServer

pytestmark = [pytest.mark.nats, pytest.mark.invented_events]


async def test_no_event_waits_in_a_broken_connection_for_the_next_one(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    async with running(nats_server.url, tmp_path) as node:
        await node.emit()
        await node.all_published()
        client, down = node.connection.client, node.connection.changed
        await nats_server.kill()
        # The socket is dead, and the client has not read that yet, or just has: what is published stays.
        await client._send_command(b"PUB vcnode.evt.n1.pod.created.p1  5\r\nstale\r\n")
        await asyncio.wait_for(down.wait(), WAIT_S)
        await nats_server.start()
        await node.connected()
        await node.emit()
        await node.all_published()
        stored = await everything(nats_server.url)
        assert b"stale" not in stored
        assert len(stored) == 2


async def everything(url: str) -> list[bytes]:
    """What the stream has."""
    client = await nats.connect(url)
    try:
        js = client.jetstream()
        count = (await js.stream_info("vcnode-events")).state.messages
        sub = await js.subscribe("vcnode.evt.>", ordered_consumer=True)
        return [(await sub.next_msg(timeout=WAIT_S)).data for _ in range(count)]
    finally:
        await client.close()
