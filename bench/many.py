"""Many simulated nodes in one process, for `fleet`: the node agent's own code on mock drivers.

python -m bench.many URL ROOT FIRST COUNT LEASE_S

Prints ``ready`` when all are connected, and ends with its standard input: nothing of a simulated node is
worth an orderly end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
from pathlib import Path
from unittest import mock

from vcnode.drivers.mock_host import MockHost
from vcnode.models.call import Call
from vcnode.models.pod import HypervisorType
from vcnode.node import running
from vcnode.settings import CapacitySettings, NatsSettings, Settings

IMAGE = "busybox"
AT_ONCE = 8
"""Nodes of one process that start at the same time."""


def node_name(number: int) -> str:
    """What the node of that number is called."""
    return f"n{number:06}"


def settings(root: Path, url: str, number: int, lease_s: float) -> Settings:
    """A node with room for whatever the benchmark places."""
    directory = root / node_name(number)
    (directory / "roots" / IMAGE).mkdir(parents=True)
    return Settings(
        node_name=node_name(number),
        state_dir=directory / "state",
        run_dir=directory / "run",
        allowed_roots=(directory / "roots",),
        hypervisor=HypervisorType.MOCK,
        metrics_address="",
        capacity=CapacitySettings(mem_mib=65_536, vcpu_count=32),
        nats=NatsSettings(url=url, lease_s=lease_s),
    )


def _keep_nothing(host: MockHost, operation: str = "") -> None:
    pass


async def main(url: str, root: Path, first: int, count: int, lease_s: float) -> None:
    """Start the nodes, say so, and wait for the end of standard input."""
    turns = asyncio.Semaphore(AT_ONCE)
    async with contextlib.AsyncExitStack() as stack:
        # The file in which a mock host outlives its node agent is no part of a node agent.
        stack.enter_context(mock.patch.object(MockHost, "save", _keep_nothing))

        async def start(number: int) -> None:
            async with turns:
                given = settings(root, url, number, lease_s)
                node = await stack.enter_async_context(running(given))
                path = str(given.allowed_roots[0] / IMAGE)
                await node.images.import_(IMAGE, path, Call(command_id="bench", verb="image.import"))
                await node.connection.wait_connected()

        async with asyncio.TaskGroup() as tasks:
            for number in range(first, first + count):
                tasks.create_task(start(number))
        # A full collection would look at all nodes for the garbage of one, and stop them all meanwhile.
        gc.collect()
        gc.freeze()
        print("ready", flush=True)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
        await ended.wait()
        os._exit(0)


if __name__ == "__main__":
    url, root, first, count, lease_s = sys.argv[1:]
    asyncio.run(main(url, Path(root), int(first), int(count), float(lease_s)))
