"""The bridge with real frames: a test that holds a pod's tap is its guest. No VM is needed for that."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import secrets
import select
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.netns import private_network
from tests.unit.drivers.network import frames
from vcnode.drivers import namespaces
from vcnode.drivers.network.bridge import BridgeNetwork, Nft, guard, names
from vcnode.errors import NetworkError, UnsupportedError
from vcnode.models.network import Interworking, NetworkConfig, PortMapping, RateMbit
from vcnode.models.vm import NetworkAttachment, NetworkRequest
from vcnode.settings import BridgeSettings

pytestmark = pytest.mark.root

LIMIT_S = 20.0
ARRIVES_S = 5.0
"""Longest wait for a frame that must come."""
BROADCAST = "ff:ff:ff:ff:ff:ff"


def sh(*argv: str) -> str:
    """The output of a short command."""
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


class Guest:
    """The other end of a pod's tap."""

    def __init__(self, attachment: NetworkAttachment, tap: int) -> None:
        self.attachment = attachment
        self.tap = tap
        endpoint = attachment.endpoints[0]
        self.mac = endpoint.mac
        interfaces = [ipaddress.ip_interface(address) for address in endpoint.addresses]
        self.v4, self.v6 = str(interfaces[0].ip), str(interfaces[1].ip)
        self.gateway = str(interfaces[0].network[1])
        self.link_local = str(guard.Identity.of(self.mac, (), "", (), ()).link_local)
        os.set_blocking(tap, False)

    def send(self, frame: bytes) -> None:
        os.write(self.tap, frames.VNET_HEADER + frame)

    def receive(self, wanted: bytes, *, within_s: float = ARRIVES_S) -> bytes:
        """The next frame with *wanted* in it."""
        deadline = time.monotonic() + within_s
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.tap], [], [], left)[0]:
                frame = os.read(self.tap, 65536)[len(frames.VNET_HEADER) :]
                if wanted in frame:
                    return frame
        raise TimeoutError(wanted)


class Host:
    """A bridge network in a host's network of its own."""

    def __init__(self, mark: str, settings: BridgeSettings) -> None:
        self.mark = mark
        self.network = BridgeNetwork(settings, mark, Nft.find())
        self.held: list[NetworkAttachment] = []
        self._taps: list[int] = []

    async def pod(self, **config: object) -> Guest:
        """A new pod."""
        planned = self.plan(**config)
        self.held.append(planned)
        attached = await self.network.attach(planned, timeout_s=LIMIT_S)
        taps = await self.network.open_taps(attached)
        self._taps += taps
        return Guest(attached, taps[0])

    def plan(self, **config: object) -> NetworkAttachment:
        """What the next pod would get."""
        number = len(self.held) + 1
        request = NetworkRequest(
            pod_id=f"p{number}",
            vm_id=f"{self.mark}{number:07x}",
            config=NetworkConfig(**config),  # type: ignore[arg-type]
        )
        return self.network.plan(request, self.held)

    def close_taps(self) -> None:
        """As the end of their VMs would."""
        while self._taps:
            os.close(self._taps.pop())

    async def close(self) -> None:
        self.close_taps()
        for attachment in self.held:
            await self.network.detach(attachment, timeout_s=LIMIT_S)
        assert [h for h in await self.network.held(self.mark) if h.vm_id is not None] == []
        await self.network.close()
        assert [name for _, name in socket.if_nameindex()] == ["lo"]


@contextlib.asynccontextmanager
async def bridging(**settings: object) -> AsyncIterator[Host]:
    with private_network():
        host = Host(f"vm-{secrets.token_hex(3)[:5]}", BridgeSettings(**settings))  # type: ignore[arg-type]
        await host.network.open()
        try:
            yield host
        finally:
            await host.close()


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    async with bridging() as made:
        yield made


def hears(sock: socket.socket, *, within_s: float = ARRIVES_S) -> bytes | None:
    sock.settimeout(within_s)
    try:
        return sock.recv(2048)
    except TimeoutError:
        return None


@contextlib.contextmanager
def listening(family: int = socket.AF_INET) -> Iterator[socket.socket]:
    """A datagram socket of the host on port 7."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 7))
        yield sock


@pytest.mark.parametrize("mode", list(Interworking))
async def test_what_is_the_pods_own_arrives_and_what_is_not_does_not(host: Host, mode: Interworking):
    pod, other = await host.pod(interworking=mode), await host.pod()
    gateway = names.bridge_mac(names.bridge(host.mark, None))
    with listening() as sock:
        forged = [
            frames.udp4(pod.mac, gateway, other.v4, pod.gateway, b"another address"),
            frames.udp4(other.mac, gateway, pod.v4, pod.gateway, b"another MAC"),
            frames.arp(pod.mac, pod.mac, other.v4, pod.gateway),
            # The kernel takes the tag off before the guard sees the frame.
            *(
                frames.tagged(frames.udp4(pod.mac, gateway, other.v4, pod.gateway, b"in a VLAN"), vlan)
                for vlan in (0, 5)
            ),
        ]
        for frame in forged:
            pod.send(frame)
        pod.send(frames.udp4(pod.mac, gateway, pod.v4, pod.gateway, b"my own"))
        assert hears(sock) == b"my own"  # frames keep their order: the others would have come before
    pod.send(frames.arp(pod.mac, pod.mac, pod.v4, pod.gateway))
    answer = pod.receive(frames.mac(pod.mac) + frames.mac(gateway) + b"\x08\x06")
    assert frames.mac(gateway) in answer
    neighbours = sh("ip", "neigh")
    assert other.v4 not in neighbours


async def test_the_host_reaches_a_pod_with_frames_as_large_as_the_mtu(host: Host):
    pod = await host.pod()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        sock.bind((pod.gateway, 7))
        _introduce(pod)
        sock.sendto(b"y" * 1472, (pod.v4, 7))
        arp = pod.receive(b"", within_s=ARRIVES_S)
        if b"\x08\x06" in arp[12:14]:  # it asks once more
            pod.send(_arp_reply(pod, arp))
            arp = pod.receive(b"y" * 1472)
        assert arp.count(b"y" * 1472) == 1
        with pytest.raises(OSError, match="too long"):
            sock.sendto(b"y" * 1473, (pod.v4, 7))


def _introduce(pod: Guest) -> None:
    """Ask for the gateway until it answers: what is sent while a bridge's port comes up may be lost."""
    for _ in range(5):
        pod.send(frames.arp(pod.mac, pod.mac, pod.v4, pod.gateway))
        try:
            pod.receive(b"\x08\x06", within_s=ARRIVES_S / 2)
        except TimeoutError:
            continue
        return
    raise TimeoutError("The gateway does not answer.")


def _arp_reply(pod: Guest, request: bytes) -> bytes:
    asker_mac, asker_ip = request[22:28], request[28:32]
    body = request[14:20] + b"\0\2" + frames.mac(pod.mac) + socket.inet_aton(pod.v4) + asker_mac + asker_ip
    return frames.ethernet(pod.mac, asker_mac.hex(":"), 0x0806, body)


async def test_pods_hear_each_other_only_where_they_share_a_network(host: Host):
    alone, second = await host.pod(), await host.pod()
    blue = await host.pod(networks=("blue",))
    friend = await host.pod(networks=("blue",))
    stranger = await host.pod(networks=("red",))
    everybody = (alone, second, friend, stranger)

    def tell(sender: Guest, receiver: Guest, data: bytes) -> None:
        """Directly, by the gateway, and to all."""
        network = sender.attachment.endpoints[0].network
        gateway = names.bridge_mac(names.bridge(host.mark, network))
        for dst in (receiver.mac, gateway, BROADCAST):
            sender.send(frames.udp4(sender.mac, dst, sender.v4, receiver.v4, data))

    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for receiver in everybody:
        tell(blue, receiver, b"from blue")
    tell(alone, second, b"from alone")
    tell(stranger, blue, b"from red")
    assert b"from blue" in friend.receive(b"from blue")
    for deaf, data in ((second, b"from"), (alone, b"from"), (stranger, b"from"), (blue, b"from red")):
        # Whatever was to come has come: a frame of the host's own follows it on the same way.
        seen = _until(deaf, b"the end", ask=partial(_tell_the_end, deaf))
        assert not any(data in frame for frame in seen), (deaf.attachment.pod_id, seen)


@pytest.mark.parametrize("mode", list(Interworking))
async def test_friends_of_one_network_cannot_pose_as_each_other_or_as_the_router(
    host: Host, mode: Interworking
):
    pod = await host.pod(networks=("blue",), interworking=mode)
    friend, third = await host.pod(networks=("blue",)), await host.pod(networks=("blue",))
    own = next(g for g in pod.attachment.endpoints[0].routes if g.gateway and ":" in g.gateway)
    lies = [
        frames.advertisement(pod.mac, pod.v6, third.v6),
        frames.advertisement(pod.mac, pod.v6, str(own.gateway)),
        frames.advertisement(pod.mac, third.v6, third.v6),
        frames.icmp6(pod.mac, "33:33:00:00:00:01", pod.link_local, "ff02::1", 134, bytes(12)),
        frames.icmp6(pod.mac, friend.mac, pod.link_local, friend.v6, 137, bytes(36)),
    ]
    lies += [frames.extended(lie, kind) for lie in lies for kind in (0, 43, 60)]
    lies += [frames.fragment(lie) for lie in lies]
    lies += [
        frames.arp(pod.mac, pod.mac, third.v4, friend.v4),
        frames.arp(pod.mac, third.mac, pod.v4, friend.v4),
    ]
    for lie in lies:
        pod.send(lie)
        pod.send(frames.tagged(lie, 0))
    pod.send(frames.udp4(pod.mac, friend.mac, pod.v4, friend.v4, b"the truth"))
    while b"the truth" not in (frame := friend.receive(b"")):
        assert frame[6:12] != frames.mac(pod.mac), frame.hex()  # nothing but the truth comes from there


def _tell_the_end(guest: Guest) -> None:
    """A datagram of the host's own, which may be lost while it looks for its neighbour."""
    guest.send(frames.arp(guest.mac, guest.mac, guest.v4, guest.gateway))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"the end", (guest.v4, 9))


def _until(guest: Guest, last: bytes, *, ask: Callable[[], object]) -> list[bytes]:
    """All frames before the one with *last* in it, which is asked for, by *ask*, until it comes."""
    seen: list[bytes] = []
    deadline = time.monotonic() + 4 * ARRIVES_S
    frame = b""
    while time.monotonic() < deadline:
        try:
            if not frame:
                ask()
            frame = guest.receive(b"", within_s=1.0)
        except TimeoutError:
            frame = b""
            continue
        if (
            frame[12:14] == b"\x08\x06"
            and frame[20:22] == b"\0\1"
            and frame[38:42] == socket.inet_aton(guest.v4)
        ):
            guest.send(_arp_reply(guest, frame))
        if last in frame:
            return seen
        seen.append(frame)
    raise TimeoutError(last)


async def test_a_published_port_leads_to_the_pod(host: Host):
    pod = await host.pod(ports=(PortMapping(host=8053, container=53, protocol="udp"),))
    pod.send(frames.arp(pod.mac, pod.mac, pod.v4, pod.gateway))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        _until(pod, b"question", ask=lambda: sock.sendto(b"question", (pod.gateway, 8053)))
    await host.network.detach(pod.attachment, timeout_s=LIMIT_S)
    nft = Nft.find()
    assert nft is not None
    assert await nft.published(names.table(host.mark), timeout_s=LIMIT_S) == []


async def test_rates_are_bounded_both_ways(host: Host):
    pod = await host.pod(rate_mbit=RateMbit(ingress=10, egress=5))
    endpoint = pod.attachment.endpoints[0]
    shown = namespaces.call(
        pod.attachment.netns_path,
        lambda: sh("tc", "qdisc"),
    )
    assert "tbf" in shown
    assert "rate 5Mbit" in shown
    outside = sh("tc", "qdisc")
    assert f"dev {endpoint.host_interface} root" in outside
    assert "rate 10Mbit" in outside


async def test_a_name_that_is_taken_is_passed_over(host: Host):
    taken = names.host_interface(f"{host.mark}0000001", "0")
    sh("ip", "link", "add", taken, "type", "bridge")
    pod = await host.pod()
    name = pod.attachment.endpoints[0].host_interface
    assert name == names.host_interface(f"{host.mark}0000001", "a")
    sh("ip", "link", "del", taken)


async def test_a_bridge_whose_name_is_taken_is_told_and_left_alone(host: Host):
    taken = names.bridge(host.mark, "blue")
    sh("ip", "link", "add", taken, "up", "type", "ifb")
    planned = host.plan(networks=("blue",))
    with pytest.raises(NetworkError, match=f"Interface {taken} is no bridge, .*; rename or remove it"):
        await host.network.attach(planned, timeout_s=LIMIT_S)
    await host.network.detach(planned, timeout_s=LIMIT_S)
    await host.network.close()
    sh("ip", "link", "del", taken)  # it is still there


async def test_nothing_of_nftables_stays_when_all_networks_had_names(host: Host):
    nft = Nft.find()
    assert nft is not None
    pod = await host.pod(networks=("blue",), ports=(PortMapping(host=8080, container=80),))
    host.close_taps()
    await host.network.detach(pod.attachment, timeout_s=LIMIT_S)
    assert await nft.tables(names.TABLE_PREFIX, timeout_s=LIMIT_S) == [names.table(host.mark)]
    again = BridgeNetwork(BridgeSettings(), host.mark, nft)
    await again.open()  # as after a crash
    assert await nft.tables(names.TABLE_PREFIX, timeout_s=LIMIT_S) == []
    await again.close()


async def test_a_kernel_that_refuses_nftables_is_told_and_pods_work_without(tmp_path: Path):
    program = tmp_path / "nft"
    program.write_text("#!/bin/sh\necho 'Error: Could not process rule: Not supported' >&2; exit 1\n")
    program.chmod(0o755)
    with private_network():
        network = BridgeNetwork(BridgeSettings(), "vm-00000", Nft(str(program)))
        await network.open()
        assert "Not supported. Load the kernel's modules for nftables" in network.info.notes[0]
        assert network.info.capabilities == ("rate_mbit", "spares")
        request = NetworkRequest(pod_id="p", vm_id="vm-000001234567")
        attached = await network.attach(network.plan(request, ()), timeout_s=LIMIT_S)
        await network.detach(attached, timeout_s=LIMIT_S)
        await network.close()


async def test_a_namespace_whose_name_is_taken_is_used_up_by_detach(host: Host):
    pod_vm = f"{host.mark}0000001"
    Path(namespaces.path_of(pod_vm)).touch()  # what a crash between two system calls leaves
    with pytest.raises(NetworkError):
        await host.pod()
    await host.network.detach(host.held.pop(), timeout_s=LIMIT_S)
    await host.pod()


async def test_bridges_and_ports_that_somebody_removed_come_back(host: Host):
    pod = await host.pod(ports=(PortMapping(host=8080, container=80),))
    sh("nft", "flush", "ruleset")
    again = BridgeNetwork(BridgeSettings(), host.mark, Nft.find())
    await again.open()
    await again.recover(pod.attachment, timeout_s=LIMIT_S)
    nft = Nft.find()
    assert nft is not None
    published = await nft.published(names.table(host.mark), timeout_s=LIMIT_S)
    assert {p.vm_id for p in published} == {pod.attachment.vm_id}
    veth = pod.attachment.endpoints[0].host_interface
    assert veth is not None
    sh("ip", "link", "del", veth)
    with pytest.raises(NetworkError, match=veth):
        await again.recover(pod.attachment, timeout_s=LIMIT_S)


async def test_subnets_that_are_changed_under_running_pods_are_told(host: Host):
    pod = await host.pod(ports=(PortMapping(host=8080, container=80),))
    host.close_taps()
    for changed in ("10.119.0.0/20", "10.0.0.0/8", "10.120.0.0/16"):
        again = BridgeNetwork(BridgeSettings(subnet4=changed), host.mark, Nft.find())  # type: ignore[arg-type]
        await again.open()
        with pytest.raises(UnsupportedError, match=r"pods still run in 10\.119\.0\.0/17, .* set the former"):
            again.check(NetworkConfig())
        with pytest.raises(NetworkError, match="is left as it is: pods still run"):
            await again.recover(pod.attachment, timeout_s=LIMIT_S)
        assert "8080" in sh("nft", "list", "table", "inet", names.table(host.mark))
        await again.close()


async def test_eight_networks_for_one_pod(host: Host):
    pod = await host.pod(
        networks=tuple(f"n{number}" for number in range(8)), ports=(PortMapping(host=8080, container=80),)
    )
    assert len({e.addresses for e in pod.attachment.endpoints}) == 8
    await host.network.recover(pod.attachment, timeout_s=LIMIT_S)


async def test_many_at_once(host: Host):
    pods = await asyncio.gather(*(host.pod() for _ in range(8)))
    assert len({pod.v4 for pod in pods}) == 8


async def test_a_host_whose_routes_lie_across_the_subnet_is_told_what_to_do():
    with private_network():
        sh("ip", "link", "add", "x0", "type", "bridge")
        sh("ip", "addr", "add", "10.119.7.1/24", "dev", "x0")
        sh("ip", "link", "set", "x0", "up")
        network = BridgeNetwork(BridgeSettings(), "vm-00000", Nft.find())
        await network.open()
        (note,) = network.info.notes
        assert "10.119.7.0/24" in note
        with pytest.raises(UnsupportedError, match="subnet4"):
            network.check(NetworkConfig())
        await network.close()


async def test_without_nftables_pods_work_but_publish_nothing():
    with private_network():
        network = BridgeNetwork(BridgeSettings(), "vm-00000", None)
        await network.open()
        assert network.info.capabilities == ("rate_mbit", "spares")
        assert any("nftables" in note for note in network.info.notes)
        with pytest.raises(UnsupportedError, match="nftables"):
            network.check(NetworkConfig(ports=(PortMapping(host=80, container=80),)))
        request = NetworkRequest(pod_id="p", vm_id="vm-000001234567")
        attached = await network.attach(network.plan(request, ()), timeout_s=LIMIT_S)
        await network.detach(attached, timeout_s=LIMIT_S)
        await network.close()
