"""The test server itself: it starts, can be killed, and comes back on its port with its store."""

from __future__ import annotations

import nats as nats_py
import pytest

from tests.support.nats import NatsServer

pytestmark = pytest.mark.nats


async def test_server_keeps_port_and_store_over_a_kill(nats_server: NatsServer) -> None:
    url = nats_server.url
    client = await nats_py.connect(url)
    stream = client.jetstream()
    await stream.add_stream(name="s", subjects=["s.>"])
    await stream.publish("s.1", b"kept")
    await client.close()

    await nats_server.kill()
    await nats_server.start()

    assert nats_server.url == url
    client = await nats_py.connect(url)
    info = await client.jetstream().stream_info("s")
    assert info.state.messages == 1
    await client.close()
