"""Real connections over the bridge between the host and guests that are namespaces: rates, sizes, ports."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

import pytest

from tests.drivers.test_bridge import LIMIT_S, Host, bridging, sh
from tests.support import networks
from tests.support.peers import Peer, connection, peer, transfer
from vcnode.drivers import namespaces
from vcnode.drivers.network.bridge import BridgeNetwork, Nft, names
from vcnode.errors import FailedPreconditionError, NetworkError
from vcnode.models.network import Interworking, NetworkConfig, PortMapping, RateMbit
from vcnode.models.vm import NetworkRequest
from vcnode.settings import BridgeSettings

pytestmark = pytest.mark.root
_numbers = itertools.count(1)


class Site:
    """A host with guests."""

    def __init__(self, host: Host, stack: ExitStack) -> None:
        self.host = host
        self.stack = stack

    async def guest(self, **config: Any) -> Peer:
        """A new pod with its guest."""
        planned = self.host.plan(**config)
        self.host.held.append(planned)
        attached = await self.host.network.attach(planned, timeout_s=LIMIT_S)
        (tap,) = await self.host.network.open_taps(attached)
        self.stack.callback(os.close, tap)
        name = f"guest-{os.getpid()}-{next(_numbers)}"
        return self.stack.enter_context(peer(name, attached, tap))

    def gateway(self, guest: Peer, version: int = 4) -> str:
        """The host's address in a guest's network."""
        networks = [ipaddress.ip_interface(a).network for a in guest.attachment.endpoints[0].addresses]
        return next(str(network[1]) for network in networks if network.version == version)


@contextlib.asynccontextmanager
async def site(**settings: Any) -> AsyncIterator[Site]:
    async with bridging(**settings) as host:
        with ExitStack() as stack:
            yield Site(host, stack)


def connected(client: socket.socket, where: tuple[str, int], family: int, at: Peer | None) -> Any:
    """Connect to a server in a guest, or on the host."""
    server = socket.socket(family, socket.SOCK_STREAM) if at is None else at.socket(family)
    # The connection before this one may still be in TIME_WAIT there.
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(where)
    return connection(client, server)


@pytest.mark.parametrize("mode", list(Interworking))
async def test_a_rate_bounds_what_a_pod_sends_and_receives(mode: Interworking, record_property: Any) -> None:
    """Within 10 % above and a third below what was asked for: the rest is the machine's other work."""
    size_bytes, limits = 1_500_000, RateMbit(ingress=40, egress=20)
    async with site() as found:
        guest = await found.guest(rate_mbit=limits, interworking=mode)
        where = (found.gateway(guest), 0)

        def measure() -> tuple[float, float]:
            inner, outer = connected(guest.socket(), where, socket.AF_INET, None)
            with inner, outer:
                return transfer(inner, outer, size_bytes), transfer(outer, inner, size_bytes)

        sent, received = await asyncio.to_thread(measure)
    record_property("mbit", {"sent": sent, "received": received})
    burst_bytes = 64 * 1024  # passes at once
    share = size_bytes / (size_bytes - burst_bytes)
    assert 20 * 0.66 < sent < 20 * share * 1.1
    assert 40 * 0.66 < received < 40 * share * 1.1


async def test_without_a_rate_nothing_is_bounded() -> None:
    async with site() as found:
        guest = await found.guest()

        def measure() -> float:
            inner, outer = connected(guest.socket(), (found.gateway(guest), 0), socket.AF_INET, None)
            with inner, outer:
                return transfer(outer, inner, 4_000_000)

        assert await asyncio.to_thread(measure) > 60


def arrives(sender: Peer | None, receiver: Peer | None, address: str, size: int, *, within_s: float) -> bool:
    """Whether a datagram of so many bytes that may not be cut comes through; sent again until it does."""
    v6 = ":" in address
    family = socket.AF_INET6 if v6 else socket.AF_INET
    with ExitStack() as sockets:
        ends = [
            sockets.enter_context(
                socket.socket(family, socket.SOCK_DGRAM)
                if at is None
                else at.socket(family, socket.SOCK_DGRAM)
            )
            for at in (sender, receiver)
        ]
        # IP_MTU_DISCOVER and IPV6_MTU_DISCOVER, "do": EMSGSIZE instead of pieces
        ends[0].setsockopt(socket.IPPROTO_IPV6 if v6 else socket.IPPROTO_IP, 23 if v6 else 10, 2)
        ends[1].bind((address, 7))
        ends[1].settimeout(0.2)
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            ends[0].sendto(bytes(size), (address, 7))
            with contextlib.suppress(TimeoutError):
                return len(ends[1].recv(1 << 16)) == size
    return False


@pytest.mark.parametrize("mtu", [576, 9000])
async def test_small_and_large_frames_pass_whole(mtu: int) -> None:
    async with site(mtu=mtu, subnet6="" if mtu < 1280 else "fd76:636e:6f64::/64") as found:
        guest = await found.guest()
        assert guest.attachment.endpoints[0].mtu == mtu
        for index, address in enumerate(guest.addresses):
            gateway = found.gateway(guest, (4, 6)[index])
            whole = mtu - (28, 48)[index]
            for way in ((guest, None, gateway), (None, guest, address)):
                assert arrives(*way, whole, within_s=10), way
                with pytest.raises(OSError, match="too long"):
                    arrives(*way, whole + 1, within_s=1)


async def test_a_node_with_ipv6_only() -> None:
    async with site(subnet4="") as found:
        web = await found.guest(networks=("blue",), ports=(PortMapping(host=8080, container=80),))
        friend = await found.guest(networks=("blue",))
        (address,) = web.addresses
        assert ":" in address
        gateway = found.gateway(web, 6)
        assert arrives(web, None, gateway, 100, within_s=10)

        def talk() -> None:
            for client in (socket.socket(socket.AF_INET6), friend.socket(socket.AF_INET6)):
                for end in connected(client, (address, 80), socket.AF_INET6, web):
                    end.close()
            server = web.socket(socket.AF_INET6)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("::", 80))
            server.listen(1)
            with server, socket.create_connection((gateway, 8080), timeout=20):
                server.accept()[0].close()

        await asyncio.to_thread(talk)


# -- ports ------------------------------------------------------------------------------------------


async def test_a_port_on_which_a_program_of_the_host_listens_is_refused() -> None:
    async with site() as found:
        network = found.host.network
        ports = (PortMapping(host=8080, container=80), PortMapping(host=53, container=53, protocol="udp"))
        for kind, port in ((socket.SOCK_STREAM, 8080), (socket.SOCK_DGRAM, 53)):
            with socket.socket(socket.AF_INET6, kind) as program:
                program.bind(("::", port))
                if kind == socket.SOCK_STREAM:
                    program.listen()
                planned = found.host.plan(ports=ports)
                with pytest.raises(FailedPreconditionError, match=f"listens on ... port {port}; end it"):
                    await network.attach(planned, timeout_s=LIMIT_S)
                await network.detach(planned, timeout_s=LIMIT_S)
        with socket.create_server(("127.0.0.1", 8080)):  # where published ports do not lead
            await found.guest(ports=ports)


async def test_published_ports_lead_to_the_pod_from_everywhere_and_answers_come_back() -> None:
    """TCP and UDP, IPv4 and IPv6: from the host, another pod, the pod itself, and from outside."""
    async with site() as found:
        ports = tuple(PortMapping(host=8080, container=80, protocol=p) for p in ("tcp", "udp"))
        web, other = await found.guest(ports=ports), await found.guest()
        friend = await found.guest(networks=("blue",))
        outside = found.stack.enter_context(networks.named(f"out-{os.getpid()}"))
        sh("ip", "link", "add", "up0", "type", "veth", "peer", "name", "out0", "netns", outside)
        found.stack.callback(sh, "ip", "link", "del", "up0")
        for near, far in (("198.51.100.1", "198.51.100.2"), ("2001:db8::1", "2001:db8::2")):
            length, nodad = ("64", ("nodad",)) if ":" in near else ("24", ())
            sh("ip", "addr", "add", f"{near}/{length}", "dev", "up0", *nodad)
            networks.run("ip", "addr", "add", f"{far}/{length}", "dev", "out0", *nodad, netns=outside)
        sh("ip", "link", "set", "up0", "up")
        networks.run("ip", "link", "set", "out0", "up", netns=outside)
        networks.settle(outside, "out0")
        clients: dict[str, Callable[[int, int], socket.socket]] = {
            "host": lambda family, kind: socket.socket(family, kind),
            "itself": web.socket,
            "pod": other.socket,
            "pod of another network": friend.socket,
            "outside": lambda family, kind: namespaces.call(outside, lambda: socket.socket(family, kind)),
        }

        def ask() -> None:
            for family, address in ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1")):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    with web.socket(family, kind) as server:
                        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        server.bind((web.addresses[family is socket.AF_INET6], 80))
                        for name, client in clients.items():
                            answers(server, client(family, kind), (address, 8080), name)

        await asyncio.to_thread(ask)


def answers(server: socket.socket, client: socket.socket, where: tuple[str, int], name: str) -> None:
    """See that the client reaches the server there and hears from it."""
    for end in (server, client):
        end.settimeout(10)
    with client:
        try:
            if client.type == socket.SOCK_STREAM:
                server.listen()
                client.connect(where)
                server.accept()[0].close()
                assert client.recv(1) == b"", name
            else:
                client.connect(where)  # so that an answer from another address is none
                client.send(b"question")
                server.sendto(b"answer", server.recvfrom(100)[1])
                assert client.recv(100) == b"answer", name
        except TimeoutError as exc:
            raise AssertionError((name, where, client.type)) from exc


async def test_pods_are_put_back_into_a_bridge_that_somebody_removed() -> None:
    async with site() as found:
        guest, other = await found.guest(rate_mbit=RateMbit(ingress=900)), await found.guest()
        gateway = found.gateway(guest)
        assert arrives(guest, None, gateway, 100, within_s=10)
        sh("ip", "link", "del", names.bridge(found.host.mark, None))
        again = BridgeNetwork(BridgeSettings(), found.host.mark, Nft.find())
        await again.open()
        for peer_of in (guest, other):
            await again.recover(peer_of.attachment, timeout_s=LIMIT_S)
        assert arrives(guest, None, gateway, 100, within_s=10)
        assert arrives(None, guest, guest.addresses[0], 100, within_s=10)
        assert not arrives(guest, other, other.addresses[0], 100, within_s=0.5)


async def test_two_nodes_on_a_host_keep_to_themselves() -> None:
    async with site() as found:
        guest = await found.guest(ports=(PortMapping(host=8080, container=80),))
        mark = f"{found.host.mark[:-1]}{'0' if found.host.mark[-1] != '0' else '1'}"
        same = BridgeNetwork(BridgeSettings(), mark, Nft.find())
        await same.open()
        with pytest.raises(Exception, match=r"10\.119\.0\.0/17 of the host; set subnet4"):
            same.check(NetworkConfig())
        other = Host(mark, BridgeSettings(subnet4="10.120.0.0/16", subnet6="fd77::/64"))  # type: ignore[arg-type]
        await other.network.open()
        with pytest.raises(FailedPreconditionError, match="8080 is published by another node agent"):
            await other.network.attach(
                planned := other.plan(ports=(PortMapping(host=8080, container=81),)), timeout_s=LIMIT_S
            )
        await other.network.detach(planned, timeout_s=LIMIT_S)
        there = Site(other, found.stack)
        stranger = await there.guest(ports=(PortMapping(host=8081, container=80),))
        for one, two, near in ((guest, stranger, found), (stranger, guest, there)):
            assert arrives(one, None, near.gateway(one), 100, within_s=10)
            for address in two.addresses:
                assert not arrives(one, two, address, 100, within_s=0.5)
        assert not [h for h in await other.network.held(mark) if h.vm_id == guest.attachment.vm_id]
        found.stack.close()
        for attachment in other.held:
            await other.network.detach(attachment, timeout_s=LIMIT_S)
        await other.network.close()
        assert names.table(found.host.mark) in sh("nft", "list", "tables")
        assert names.table(mark) not in sh("nft", "list", "tables")


async def test_a_node_whose_subnet_another_took_meanwhile_is_told() -> None:
    """Neither had a pod when both were started, so neither saw the other."""
    async with site() as found:
        mark = f"{found.host.mark[:-1]}{'0' if found.host.mark[-1] != '0' else '1'}"
        late = BridgeNetwork(BridgeSettings(), mark, Nft.find())
        await late.open()
        await found.guest()
        planned = late.plan(NetworkRequest(pod_id="p", vm_id=f"{mark}0000001"), ())
        with pytest.raises(NetworkError, match=r"lies across 10\.119\.0\.0/17 of the host; set subnet4"):
            await late.attach(planned, timeout_s=LIMIT_S)
        await late.detach(planned, timeout_s=LIMIT_S)
        await late.close()
        found.stack.close()


async def test_twenty_pods_come_and_go_at_once(host: Host) -> None:
    """Their bridges are made with the first and removed with the last of them."""
    planned = []
    for number in range(20):
        plan = host.plan(networks=(("red", "green", "blue")[number % 3],) if number % 4 else ())
        host.held.append(plan)
        planned.append(plan)

    async def live(number: int) -> None:
        attached = await host.network.attach(planned[number], timeout_s=60)
        for tap in await host.network.open_taps(attached):
            os.close(tap)
        await host.network.detach(attached, timeout_s=60)

    await asyncio.gather(*(live(number) for number in range(20)))
    assert {name for _, name in socket.if_nameindex()} <= {"lo", names.bridge(host.mark, None)}


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    async with bridging() as made:
        yield made
