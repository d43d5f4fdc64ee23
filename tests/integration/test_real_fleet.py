"""A real fleet: three node agents with real VMs on three servers of one cluster; a server, a node and a
connection end. What ran is told by the pods themselves: each run of a copy writes its own file, second by
second, on the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import nats
import nats.errors
import nats.js.errors
import pytest

from tests.faults.lives import Host, hosts
from tests.support.nats import BinaryNats, make
from vcnode.cli.demo.busybox import make_root
from vcnode.client import Client, Fleet
from vcnode.drivers.hypervisor.qemu.process import named
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec, PodState, Resources
from vcnode.pods.marks import mark_of
from vcnode.settings import NatsSettings, Settings

pytestmark = [pytest.mark.nats, pytest.mark.vm, pytest.mark.timeout(480)]

WAIT_S = 180.0
LEASE_S = 10.0
"""Longer than the servers of a cluster take to elect: nobody can renew anything meanwhile."""
FENCE_S = 4.0
COPIES = {"job-0", "job-1", "job-2"}
EFFECTS = """
pod=$(hostname)
read run < /proc/sys/kernel/random/uuid
while :; do date +%s >> /effects/$pod.$run; sleep 1; done
"""


class Cluster:
    """Three nats-servers that keep everything three times."""

    def __init__(self, place: Path) -> None:
        with contextlib.ExitStack() as held:
            probes = [held.enter_context(socket.socket()) for _ in range(3)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1] for probe in probes]
        routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports)
        # Not advertised: who is to come through a proxy would learn of the way around it.
        self.servers = {
            f"s{number}": BinaryNats(
                config_of(
                    place / f"s{number}",
                    f'server_name: s{number}\ncluster {{ name: c, listen: "127.0.0.1:{port}", '
                    f"routes: [{routes}], no_advertise: true }}\n",
                )
            )
            for number, port in enumerate(ports)
        }

    @property
    def url(self) -> str:
        return ",".join(server.url for server in self.servers.values())

    async def start(self) -> None:
        await asyncio.gather(*(server.start() for server in self.servers.values()))
        client = await nats.connect(self.url.split(","))
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    await client.jetstream(timeout=1).account_info()
                    break
                except (nats.errors.Error, nats.js.errors.Error):
                    await asyncio.sleep(0.1)  # they elect, and nothing tells when that is over
        await client.close()

    async def kill_leader(self, stream: str) -> str:
        """End the server that leads a stream."""
        client = await nats.connect(self.url.split(","))
        info = await client.jetstream().stream_info(stream)
        await client.close()
        assert info.cluster is not None
        assert info.cluster.leader is not None
        await self.servers[info.cluster.leader].kill()
        return info.cluster.leader

    async def stop(self) -> None:
        for server in self.servers.values():
            await server.kill()


def config_of(directory: Path, config: str) -> Path:
    make(directory, config=config)
    return directory / "nats.conf"


class Cable:
    """A way to the cluster that can be cut."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._port = 0

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in tuple(self._open):
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for url in self._cluster.url.split(","):
            try:
                there = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
                break
            except OSError:
                continue
        else:
            writer.transport.abort()
            return
        mine = {writer, there[1]}
        self._open |= mine
        await asyncio.gather(self._pump(reader, there[1]), self._pump(there[0], writer))
        self._open -= mine

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@pytest.fixture
async def cluster(short_dir: Path) -> AsyncIterator[Cluster]:
    made = Cluster(short_dir / "nats")
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


def job(root: Path) -> PodSpec:
    main = ContainerSpec(id="main", rootfs=str(root), cmd=Cmd(args=("/bin/sh", "-c", EFFECTS)))
    return PodSpec(resources=Resources(mem_size_mib=128), template="never", containers=(main,))


async def until(fleet: Fleet, condition: Callable[[], bool]) -> None:
    """Wait for the view to show something; looked at after each change."""
    try:
        async with asyncio.timeout(WAIT_S):
            async for _ in fleet.watch():
                if condition():
                    return
    except TimeoutError:
        nodes = {name: (node.alive, str(node.lease.renewed_at)) for name, node in fleet.nodes.items()}
        pods = {key: (status.state, status.reason) for key, status in fleet.pods.items()}
        pytest.fail(f"It does not come to that: {nodes} {pods}")


def where(fleet: Fleet) -> dict[str, str]:
    """The copies that run on nodes that are there."""
    return {
        pod_id: node
        for (node, pod_id), status in fleet.pods.items()
        if status.state is PodState.RUNNING and node in fleet.nodes and fleet.nodes[node].alive
    }


def kill_host(host: Host) -> None:
    """What a power failure leaves of the agent and its VMs."""
    os.kill(host.pid, signal.SIGKILL)
    mark = mark_of(Settings(node_name=host.name, state_dir=Path(host.settings["state_dir"])))
    for vm in named(mark):
        os.kill(vm.pid, signal.SIGKILL)


def runs(effects: Path) -> dict[str, list[tuple[int, int]]]:
    """First and last second of each run, by pod."""
    found = defaultdict(list)
    for file in effects.iterdir():
        seconds = [int(line) for line in file.read_text().split()]
        found[file.name.partition(".")[0]].append((seconds[0], seconds[-1]))
    return {pod: sorted(times) for pod, times in found.items()}


async def test_pods_are_placed_and_replaced_and_never_run_twice(
    cluster: Cluster, guest_image: Path, short_dir: Path
) -> None:
    roots = short_dir / "roots"
    make_root(roots / "app")
    (roots / "app" / "effects").mkdir(mode=0o777)
    cable = Cable(cluster)
    await cable.mend()
    shared: dict[str, Any] = {
        "guest_dir": str(guest_image),
        "allowed_roots": [str(roots)],
        "qemu": {"accel": "tcg"},
    }
    async with hosts(cluster.url.split(",")[0], shared, short_dir) as make_host:
        nodes: dict[str, Host] = {}
        for name in ("n1", "n2", "n3"):
            url = cable.url if name == "n3" else cluster.url
            link = {"url": url, "stream_storage": "memory", "stream_replicas": 3, "lease_s": LEASE_S}
            nodes[name] = host = make_host(name, node_name=name, nats=link)
            host.pid, host.ended = await host.zygote.fork(host.settings, host.log)
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(await Client.connect(NatsSettings(url=cluster.url)))
            fleet = await stack.enter_async_context(Fleet(client))
            await until(fleet, lambda: set(fleet.nodes) == set(nodes))
            lost: list[str] = []
            stack.enter_context(
                fleet._entered.listening(lambda c: lost.append(c.node) if c.kind == "node.lost" else None)
            )
            scheduler = asyncio.create_task(fleet.run_replicas("job", job(roots / "app"), 3, fence_s=FENCE_S))
            stack.callback(scheduler.cancel)
            await until(fleet, lambda: set(where(fleet)) == COPIES)
            assert set(where(fleet).values()) == set(nodes)  # spread
            first = where(fleet)

            await cluster.kill_leader("KV_vcnode-nodes")
            seen = {name: node.lease.renewed_at for name, node in fleet.nodes.items()}
            await until(fleet, lambda: all(n.lease.renewed_at > seen[m] for m, n in fleet.nodes.items()))
            assert (lost, where(fleet)) == ([], first)

            kill_host(nodes["n2"])
            await cable.cut()
            await until(fleet, lambda: set(lost) == {"n2", "n3"})
            await cable.mend()  # before its fence: the copy there is neither replaced nor touched
            await until(fleet, lambda: fleet.nodes["n3"].alive)
            await until(fleet, lambda: set(where(fleet)) == COPIES)
            after = where(fleet)
            assert "n2" not in after.values()
            assert {pod: node for pod, node in after.items() if first[pod] != "n2"} == {
                pod: node for pod, node in first.items() if node != "n2"
            }

            n2 = nodes["n2"]  # comes back, with a record of what ran there
            n2.pid, n2.ended = await n2.zygote.fork(n2.settings, n2.log)
            await until(fleet, lambda: fleet.nodes["n2"].alive and fleet.nodes["n2"].lease.epoch == 2)
            await until(fleet, lambda: {pod for _, pod in fleet.pods} == COPIES and len(fleet.pods) == 3)
            assert where(fleet) == after

            scheduler.cancel()
            for pod_id, node in after.items():
                await client.node(node).pod_delete(pod_id, force=True)
            for host in nodes.values():
                assert await host.stop() == 0, host.tail()
    ledger = runs(roots / "app" / "effects")
    assert set(ledger) == COPIES
    assert sum(map(len, ledger.values())) == 4, ledger
    for pod, times in ledger.items():
        for (_, ended), (began, _) in itertools.pairwise(times):
            assert ended < began, f"{pod} ran twice at once: {times}"
    await cable.cut()
