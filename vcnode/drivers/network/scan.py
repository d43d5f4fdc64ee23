"""What an interface has that somebody else set up: addresses and routes, as a guest is to have them.

Runs inside `vcnode.drivers.namespaces.run`, as `links`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyroute2 import AsyncIPRoute

from vcnode.drivers.network import links
from vcnode.drivers.network.links import Link, doing
from vcnode.models.network import Endpoint, NetworkInterfacePair, Route

MAX_ADDRESSES = 64
"""Of one interface; more are left out."""
MAX_ROUTES = 256
MAX_INTERFACES = 8
"""Of one VM."""
_SCOPE_HOST = 254
_RT_TABLE_MAIN, _RTN_UNICAST, _RTPROT_KERNEL = 254, 1, 2
_RTNH_F_ONLINK, _RTM_F_CLONED = 4, 0x200
_DEFAULT = {socket.AF_INET: "0.0.0.0/0", socket.AF_INET6: "::/0"}
_IPV6_METRIC = 1024
"""What the kernel gives an IPv6 route when nobody says."""


@dataclass(frozen=True, slots=True)
class Scanned:
    """An interface with what it has."""

    link: Link
    addresses: tuple[str, ...]
    """With prefix length; that of a host where the network behind the address is not on the link."""
    routes: tuple[Route, ...]
    """Those that do not follow from the addresses; what is on the link comes first."""


async def scan(netlink: AsyncIPRoute) -> list[Scanned]:
    """All interfaces but the loopback, in the order of their indexes; link-local IPv6 addresses do not count.

    Raises:
        NetworkError: The kernel does not say.
    """
    with doing("list addresses and routes"):
        addresses = [message async for message in await netlink.addr("dump")]
        routes = [
            message
            for family in _DEFAULT
            async for message in await netlink.route("dump", family=family, table=_RT_TABLE_MAIN)
        ]
    return [
        _scanned(
            link,
            [text for message in addresses if message["index"] == link.index and (text := _address(message))],
            [route for message in routes for route in _routes(message, link.index)],
        )
        for link in await links.every(netlink)
        if not link.loopback
    ]


@dataclass(frozen=True, slots=True)
class _Found:
    """A route, and whether the kernel has made it for an address."""

    route: Route
    of_kernel: bool


def _scanned(link: Link, addresses: list[str], found: list[_Found]) -> Scanned:
    on_link = {f.route.destination for f in found if f.of_kernel and f.route.gateway is None}
    given, follow = [], set()
    for text in addresses:
        interface = ipaddress.ip_interface(text)
        network = str(interface.network)
        if network in on_link or interface.network.num_addresses == 1:
            given.append(text)
            follow.add(network)
        else:  # as the plugin ptp has it: the network is reached through the gateway
            given.append(f"{interface.ip}/{interface.max_prefixlen}")
    kept = [f.route for f in found if not (f.of_kernel and f.route.destination in follow)]
    # Of several hops to one destination the first is taken: it is the same network for the guest.
    routes = list({(r.destination, r.metric): r for r in reversed(kept)}.values())[::-1]
    routes.sort(key=lambda route: route.gateway is not None)
    return Scanned(link, tuple(given[:MAX_ADDRESSES]), tuple(routes[:MAX_ROUTES]))


def _address(message: Any) -> str | None:
    address = message.get("local") or message.get("address")
    if address is None or message["scope"] >= _SCOPE_HOST or message["family"] not in _DEFAULT:
        return None
    if message["family"] == socket.AF_INET6 and ipaddress.IPv6Address(address).is_link_local:
        return None
    return f"{address}/{message['prefixlen']}"


def _routes(message: Any, index: int) -> Iterator[_Found]:
    """The route, if it leads through that interface; each of its hops that does."""
    if (
        message["type"] != _RTN_UNICAST
        or message["flags"] & _RTM_F_CLONED
        or message.get("table", message["table"]) != _RT_TABLE_MAIN
    ):
        return
    destination = message.get("dst")
    text = f"{destination}/{message['dst_len']}" if destination else _DEFAULT[message["family"]]
    network = ipaddress.ip_network(text, strict=False)
    if (network.is_link_local and network.version == 6) or network.is_multicast:
        return
    metric = message.get("priority")
    if metric == (_IPV6_METRIC if network.version == 6 else 0):
        metric = None
    of_kernel = message["proto"] == _RTPROT_KERNEL
    for hop in message.get("multipath") or (message,):
        if hop.get("oif") == index:
            gateway = hop.get("gateway") or (hop.get("via") or {}).get("addr")
            route = Route(
                destination=str(network),
                gateway=gateway,
                on_link=bool(hop["flags"] & _RTNH_F_ONLINK),
                metric=metric,
            )
            yield _Found(route, of_kernel and metric in (None, 256))


def find_obstacle(wanted: Sequence[Scanned]) -> str | None:
    """Why these cannot be wired to a VM together, as what "the namespace" has; None when they can."""
    if len(wanted) > MAX_INTERFACES:
        return f"has more than {MAX_INTERFACES} interfaces with an address"
    by_index = {s.link.index: s.link.name for s in wanted}
    for link in (s.link for s in wanted):
        if not link.mac.strip("0:"):
            return f"has {link.name}, which is no Ethernet interface"
        # All that comes in by the lower one goes to the VM, before the upper one has seen it.
        for upper, lower in ((link.index, link.lower), (link.master, link.index)):
            if upper in by_index and lower in by_index:
                return (
                    f"has {by_index[upper]} on top of {by_index[lower]}, which cannot both be wired to a VM; "
                    "take the addresses off one of them"
                )
    return None


def endpoint(scanned: Scanned, pair: NetworkInterfacePair, *, network: str | None = None) -> Endpoint:
    """The interface, wired as *pair* says, as the guest is to have it."""
    return Endpoint(
        id=pair.id,
        name=scanned.link.name,
        network=network,
        net_pair=pair,
        mac=scanned.link.mac,
        addresses=scanned.addresses,
        routes=scanned.routes,
        mtu=scanned.link.mtu,
    )
