"""Pods with real VMs on a bridge: what guests and containers see of the network, and who reaches them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest

from tests.support.netns import loopback_up, private_network
from tests.unit.drivers.network import frames
from vcnode.drivers import namespaces
from vcnode.models.call import Call
from vcnode.models.commands import ExecOptions
from vcnode.models.network import DnsConfig, NetworkConfig, NetworkModel, PortMapping
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec, PodStatus
from vcnode.models.stats import PodStatsOf
from vcnode.node import Node, running
from vcnode.pods.marks import mark_of
from vcnode.settings import BridgeSettings, NatsSettings, PoolSettings, QemuSettings, Settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

LIMIT_S = 180.0
GATEWAY4, GATEWAY6 = "10.119.0.1", "fd76:636e:6f64::1"
OUTSIDE, UPLINK = "198.51.100.2", "198.51.100.1"
ANSWER = "192.0.2.7"
_ids = itertools.count(1)

SPOOF = """
import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
for frame in sys.argv[1:]:
    s.send(bytes.fromhex(frame))
"""


def call(verb: str) -> Call:
    return Call(f"{verb}-{next(_ids)}", verb)


def sh(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def settings(guest_image: Path, short_dir: Path) -> Settings:
    roots = short_dir / "roots"
    (roots / "box" / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", roots / "box" / "bin" / "busybox")
    return Settings(
        node_name="net",
        state_dir=short_dir / "s",
        run_dir=short_dir / "r",
        guest_dir=guest_image,
        allowed_roots=(roots,),
        metrics_address="",
        nats=NatsSettings(url="nats://127.0.0.1:1"),
        qemu=QemuSettings(accel="tcg", boot_timeout_s=LIMIT_S),
        network=NetworkModel.BRIDGE,
        bridge=BridgeSettings(dns_servers=(GATEWAY4,)),
        pool=(PoolSettings(spares=1),),
    )


@pytest.fixture
def own_network(settings: Settings) -> Iterator[str]:
    """A network of the test's own with an uplink; gives the namespace of what is outside."""
    name = f"{mark_of(settings).replace('vm-', 'out-')}"
    with private_network():
        namespaces.call(None, lambda: namespaces.create(name, loopback_up))
        path = namespaces.path_of(name)
        try:
            sh("ip", "link", "add", "up0", "type", "veth", "peer", "name", "out0", "netns", path)
            sh("ip", "addr", "add", f"{UPLINK}/24", "dev", "up0")
            sh("ip", "link", "set", "up0", "up")
            sh("ip", "-n", name, "addr", "add", f"{OUTSIDE}/24", "dev", "out0")
            sh("ip", "-n", name, "link", "set", "out0", "up")
            yield path
            sh("ip", "link", "del", "up0")
        finally:
            namespaces.remove(name)


class Pods:
    """A node's pods."""

    def __init__(self, node: Node) -> None:
        self.node = node

    async def run(self, pod_id: str, **spec: object) -> PodStatus:
        return await self.node.pods.run(PodSpec(id=pod_id, **spec), call("pod.run"))  # type: ignore[arg-type]

    async def sh(self, pod_id: str, script: str, container: str | None = None) -> str:
        options = ExecOptions(cmd=Cmd(args=("/bin/busybox", "sh", "-c", script)), timeout_s=60)
        done = await self.node.pods.exec(pod_id, container, options, call("container.exec"))
        assert done.exit_code == 0, done
        return done.stdout.raw.decode()

    async def fails(self, pod_id: str, script: str) -> None:
        with pytest.raises(AssertionError):
            await self.sh(pod_id, script)

    async def delete_all(self) -> None:
        for pod in self.node.pods.list({}, ()).pods:
            await self.node.pods.delete(pod.pod_id, True, call("pod.delete"))


@contextlib.asynccontextmanager
async def started(settings: Settings) -> AsyncIterator[Pods]:
    async with running(settings) as node:
        pods = Pods(node)
        try:
            yield pods
        except BaseException:
            await pods.delete_all()
            raise


def addresses(status: PodStatus, index: int = 0) -> tuple[str, str]:
    """IPv4 and IPv6 address of a pod."""
    assert status.network is not None
    v4, v6 = (address.partition("/")[0] for address in status.network.endpoints[index].addresses)
    return v4, v6


class Resolver(asyncio.DatagramProtocol):
    """A name server to which every name leads to `ANSWER`."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        question = data[12:]
        is_a = question[-4:-2] == b"\0\1"
        answer = b"\xc0\x0c\0\1\0\1" + struct.pack("!IH", 60, 4) + socket.inet_aton(ANSWER) if is_a else b""
        header = data[:2] + struct.pack("!HHHHH", 0x8180, 1, int(is_a), 0, 0)
        self.transport.sendto(header + question + answer, addr)


async def talk(address: tuple[str, int], sock: socket.socket | None = None) -> str:
    """All that a server sends."""
    where = {"sock": sock} if sock is not None else {"host": address[0], "port": address[1]}
    async with asyncio.timeout(20):
        if sock is not None:
            try:
                await asyncio.get_running_loop().sock_connect(sock, address)
            except BaseException:
                sock.close()
                raise
        reader, writer = await asyncio.open_connection(**where)  # type: ignore[arg-type]
        try:
            return (await reader.read()).decode()
        finally:
            writer.close()
            await writer.wait_closed()


def outside_socket(path: str) -> socket.socket:
    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        return sock

    return namespaces.call(path, make)


SERVER = """
import os, socket, sys
server = socket.create_server(("::", int(sys.argv[2])), family=socket.AF_INET6, dualstack_ipv6=True)
if os.fork():
    os._exit(0)
os.setsid()
null = os.open("/dev/null", os.O_RDWR)
for fd in range(3):
    os.dup2(null, fd)
while True:
    connection, _ = server.accept()
    connection.sendall(b"hello from " + sys.argv[1].encode() + b"\\n")
    connection.close()
"""


def python(script: str, *arguments: str) -> str:
    """A line of shell that runs a script in the guest's own interpreter."""
    return f"$(echo /usr/bin/python3.*) -c '{script}' {' '.join(arguments)}"


async def test_pods_on_a_bridge(settings: Settings, own_network: str):
    async with started(settings) as pods:
        box = str(settings.allowed_roots[0] / "box")
        container = ContainerSpec(id="c", rootfs=box, cmd=Cmd(args=("/bin/busybox", "sleep", "1000")))
        web = await pods.run(
            "web",
            network=NetworkConfig(
                ports=(PortMapping(host=8080, container=80),),
                dns=DnsConfig(hosts={"db.example": "192.0.2.9"}),
            ),
            containers=(container,),
        )
        blue = await pods.run("blue", network=NetworkConfig(networks=("blue",)))
        friend = await pods.run("friend", network=NetworkConfig(networks=("blue", "red")))
        lone = await pods.run("lone", network_model=NetworkModel.NOOP)
        assert lone.network is None
        assert (await pods.sh("lone", "ls /sys/class/net")).split() == ["lo"]
        macs = [
            await pods.sh(pod_id, "cat /sys/class/net/eth*/address") for pod_id in ("web", "blue", "friend")
        ]
        own_macs = " ".join(macs).split()
        assert len(set(own_macs)) == len(own_macs) >= 3
        await host_and_pod(pods, web)
        await large_frames(pods, web)
        await counted(pods)
        await names(pods, web)
        await among_pods(pods, web, blue, friend)
        await outside(pods, web, own_network)
        await spoofing(pods, web, blue)
    # The node agent is gone; packets go on, and the next one takes the pods over.
    assert await talk((UPLINK, 8080)) == "hello from web\n"
    async with started(settings) as pods:
        assert {p.pod_id: p.state for p in pods.node.pods.list({}, ()).pods}["web"] == "running"
        assert await talk((UPLINK, 8080)) == "hello from web\n"
        assert (await pods.node.pods.audit(repair=True)).orphan_count == 0
        await pods.delete_all()
    assert sorted(name for _, name in socket.if_nameindex()) == ["lo", "up0"]
    assert namespaces.names(mark_of(settings)) == []
    assert "vcnode" not in sh("nft", "list", "tables")


async def host_and_pod(pods: Pods, web: PodStatus) -> None:
    v4, v6 = addresses(web)
    await pods.sh("web", f"ping -c 1 -w 20 {GATEWAY4} && ping -c 1 -w 20 {GATEWAY6}")
    await pods.sh("web", python(SERVER, "web", "80"))
    for address in ((v4, 80), (v6, 80), (GATEWAY4, 8080), (UPLINK, 8080)):
        assert await talk(address) == "hello from web\n", address
    assert web.network is not None
    endpoint = web.network.endpoints[0]
    assert await pods.sh("web", "cat /sys/class/net/eth0/address") == f"{endpoint.mac}\n"
    assert await pods.sh("web", "cat /sys/class/net/eth0/mtu") == f"{endpoint.mtu}\n"


async def counted(pods: Pods) -> None:
    """The host counts what goes through the pod's interface, the same way round as the guest."""
    script = f"""import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(100): sock.sendto(bytes(1000), ("{GATEWAY4}", 9))"""
    request = PodStatsOf(pod_id="web")
    before = await pods.node.pods.stats(request, call("pod.stats"))
    await pods.sh("web", python(script))
    after = await pods.node.pods.stats(request, call("pod.stats"))
    for part in ("vm", "guest"):
        (then,), (now,) = getattr(before, part).interfaces, getattr(after, part).interfaces
        assert then.name == now.name == "eth0"
        assert now.sent_bytes - then.sent_bytes >= 100_000, part
        assert now.received_bytes - then.received_bytes < 100_000, part
        assert now.sent_packets - then.sent_packets >= 100, part


async def large_frames(pods: Pods, web: PodStatus) -> None:
    """As large as the MTU passes in one piece both ways, larger ones in pieces."""
    for size in (1472, 8000):
        await pods.sh("web", f"ping -c 1 -w 20 -s {size} {GATEWAY4}")
        await pods.sh("web", f"ping -c 1 -w 20 -s {size - 20} {GATEWAY6}")


async def names(pods: Pods, web: PodStatus) -> None:
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        Resolver, local_addr=(GATEWAY4, 53)
    )
    try:
        for container in (None, "c"):
            found = await pods.sh("web", "/bin/busybox nslookup some.example", container)
            assert ANSWER in found
            etc = await pods.sh("web", "cd /etc; /bin/busybox cat hostname hosts resolv.conf", container)
            assert etc.startswith("web\n")
            assert f"{addresses(web)[0]}\tweb\n" in etc
            assert "192.0.2.9\tdb.example\n" in etc
            assert f"nameserver {GATEWAY4}\n" in etc
        await pods.sh("web", "/bin/busybox ping -c 1 -w 20 web", "c")
    finally:
        transport.close()


async def among_pods(pods: Pods, web: PodStatus, blue: PodStatus, friend: PodStatus) -> None:
    await pods.sh("friend", python(SERVER, "friend", "81"))
    for address in addresses(friend):
        assert await pods.sh("blue", f"nc -w 20 {address} 81") == "hello from friend\n"
    ping = "ping -c 2 -i 0.2 -w 1 {}"
    unreachable = [(sender, a) for sender, pod in (("web", blue), ("blue", web)) for a in addresses(pod)]
    unreachable.append(("blue", addresses(friend, 1)[0]))
    await asyncio.gather(*(pods.fails(sender, ping.format(address)) for sender, address in unreachable))


async def outside(pods: Pods, web: PodStatus, netns_path: str) -> None:
    """Pods reach the outside with the host's address; from there, published ports only lead to pods."""
    with outside_socket(netns_path) as server:
        server.bind((OUTSIDE, 90))
        server.listen()
        peer, _ = await asyncio.gather(
            _visitor(server), pods.sh("web", f"nc -w 20 {OUTSIDE} 90 </dev/null || true")
        )
        assert peer[0] == UPLINK
    assert await talk((UPLINK, 8080), outside_socket(netns_path)) == "hello from web\n"
    sh("ip", "-n", Path(netns_path).name, "route", "add", "10.119.0.0/16", "via", UPLINK)
    with outside_socket(netns_path) as direct, pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await asyncio.get_running_loop().sock_connect(direct, (addresses(web)[0], 80))


async def _visitor(server: socket.socket) -> tuple[str, int]:
    """Who connects; the connection is closed at once."""
    async with asyncio.timeout(20):
        connection, peer = await asyncio.get_running_loop().sock_accept(server)
    connection.close()
    return cast(tuple[str, int], peer)


async def spoofing(pods: Pods, web: PodStatus, blue: PodStatus) -> None:
    assert web.network is not None
    mac = web.network.endpoints[0].mac
    gateway = (await pods.sh("web", f"ping -c 1 {GATEWAY4} >/dev/null; ip neigh show {GATEWAY4}")).split()[4]
    own, other = addresses(web)[0], addresses(blue)[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((GATEWAY4, 7))
        sock.setblocking(False)
        sent = [
            frames.udp4(mac, gateway, other, GATEWAY4, b"another's address"),
            frames.udp4("02:00:00:00:00:99", gateway, own, GATEWAY4, b"another MAC"),
            frames.udp4(mac, gateway, own, GATEWAY4, b"my own"),
        ]
        await pods.sh("web", python(SPOOF, *(frame.hex() for frame in sent)))
        async with asyncio.timeout(20):
            assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"my own"
