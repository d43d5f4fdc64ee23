"""The guest's interfaces and name resolution, as ``configure`` describes them.

A clone has the MACs of its template until it is told its own, so an interface is known by its MAC if that is
right already, and else by its place among the VM's network devices.
"""

from __future__ import annotations

import os
import re
import socket

from vcnode.guest.agent import files
from vcnode.guest.agent.failures import FAILED_PRECONDITION, Failure
from vcnode.guest.agent.netlink import Netlink
from vcnode.guest.agent.params import Params, encoded, invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NET = "/sys/class/net"
_CONF = "/proc/sys/net/ipv6/conf"
_ETHERNET = "1"  # ARPHRD_ETHER
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,14}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_WORD = re.compile(r"[A-Za-z0-9_.:-]{1,255}")
_MAX_ITEMS = 256


def _packed(text: str, path: str) -> tuple[int, bytes]:
    """An address as its family and bytes."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        return family, socket.inet_pton(family, text)
    except (OSError, ValueError):
        raise invalid(path, f"{text[:64]!r} is no IP address") from None


def _prefix(item: Any, path: str) -> tuple[int, bytes, int]:
    """An address with prefix length as family, bytes, length."""
    encoded(item, path, 64)
    text, _, length = item.partition("/")
    family, packed = _packed(text, path)
    if not length.isdecimal() or int(length) > 8 * len(packed):
        raise invalid(path, "needs a prefix length")
    return family, packed, int(length)


class Route:
    """A route of an interface."""

    __slots__ = ("destination", "family", "gateway", "metric", "on_link")

    def __init__(self, item: Any, path: str) -> None:
        params = _object(item, path)
        self.family, address, length = _prefix(params.text("destination"), params.path("destination"))
        self.destination = (address, length)
        gateway = params.optional_text("gateway", longest=64)
        self.gateway: bytes | None = None
        if gateway is not None:
            family, self.gateway = _packed(gateway, params.path("gateway"))
            if family != self.family:
                raise invalid(params.path("gateway"), "is of another family than the destination")
        self.on_link = params.flag("on_link")
        self.metric = params.optional_integer("metric", 0, (1 << 32) - 1)
        params.done()


class Interface:
    """An interface as it is to be."""

    __slots__ = ("addresses", "mac", "mtu", "name", "routes")

    def __init__(self, item: Any, path: str) -> None:
        params = _object(item, path)
        self.name = params.text("name", longest=15)
        if not _NAME.fullmatch(self.name):
            raise invalid(params.path("name"), f"{self.name!r} is no name of an interface")
        self.mac = params.text("mac", longest=17).lower()
        if not _MAC.fullmatch(self.mac):
            raise invalid(params.path("mac"), f"{self.mac!r} is no hardware address")
        self.addresses = params.array("addresses", _prefix, longest=_MAX_ITEMS)
        self.mtu = params.integer("mtu", 68, 65535)
        self.routes = params.array("routes", Route, longest=_MAX_ITEMS)
        params.done()

    @property
    def has_ipv6(self) -> bool:
        """Whether it speaks IPv6."""
        return any(family == socket.AF_INET6 for family, _, _ in self.addresses)


class Resolver:
    """Name resolution."""

    __slots__ = ("hosts", "options", "search", "servers")

    def __init__(self, params: Params) -> None:
        self.servers = params.array("servers", _address, longest=_MAX_ITEMS)
        self.search = params.array("search", _word, longest=_MAX_ITEMS)
        self.options = params.array("options", _word, longest=_MAX_ITEMS)
        self.hosts = params.array("hosts", _host, longest=_MAX_ITEMS)
        params.done()

    def resolv_conf(self) -> str:
        """The file of that name."""
        lines = [f"nameserver {server}\n" for server in self.servers]
        if self.search:
            lines.append(f"search {' '.join(self.search)}\n")
        if self.options:
            lines.append(f"options {' '.join(self.options)}\n")
        return "".join(lines)


def _object(item: Any, path: str) -> Params:
    if type(item) is not dict:
        raise invalid(path, "must be an object")
    return Params(item, path)


def _address(item: Any, path: str) -> str:
    encoded(item, path, 64)
    _packed(item, path)
    return str(item)


def _word(item: Any, path: str) -> str:
    encoded(item, path, 255)
    if not _WORD.fullmatch(item):
        raise invalid(path, f"{item!r} is no single word")
    return str(item)


def _host(item: Any, path: str) -> tuple[str, str]:
    """A pair of name and address."""
    if type(item) is not list or len(item) != 2:
        raise invalid(path, "must be a pair of name and address")
    return _word(item[0], f"{path}[0]"), _address(item[1], f"{path}[1]")


def hosts_file(hostname: str, interfaces: tuple[Interface, ...], resolver: Resolver) -> str:
    """The content of /etc/hosts."""
    lines = ["127.0.0.1\tlocalhost\n", "::1\tlocalhost ip6-localhost ip6-loopback\n"]
    own = [socket.inet_ntop(family, address) for i in interfaces[:1] for family, address, _ in i.addresses]
    lines += [f"{address}\t{hostname}\n" for address in own or ["127.0.1.1"]]
    lines += [f"{address}\t{name}\n" for name, address in resolver.hosts]
    return "".join(lines)


def apply(interfaces: tuple[Interface, ...]) -> None:
    """Set the interfaces up. Raises OSError, and `Failure` when the guest has fewer; can be repeated."""
    if not interfaces:
        return
    netlink = Netlink()
    try:
        for interface, (index, present) in zip(interfaces, _matched(interfaces), strict=True):
            _configure(netlink, interface, index, present)
    finally:
        netlink.close()


def _configure(netlink: Netlink, interface: Interface, index: int, present: str) -> None:
    _tune(present, interface)
    mac = bytes.fromhex(interface.mac.replace(":", ""))
    if present != interface.name:  # only an interface that is down can be renamed
        netlink.set_link(index, name=interface.name, mac=mac, mtu=interface.mtu, up=False)
    netlink.set_link(index, name=None, mac=mac, mtu=interface.mtu, up=True)
    for family, address, length in interface.addresses:
        netlink.add_address(index, family, address, length)
    # Routes on the link come first: gateways may be reached through them.
    for route in sorted(interface.routes, key=lambda r: r.gateway is not None):
        netlink.add_route(
            index,
            route.family,
            route.destination,
            route.gateway,
            on_link=route.on_link,
            metric=route.metric,
        )


def _tune(name: str, interface: Interface) -> None:
    """The host says what the addresses are: nothing is taken from the network, and nothing asked there."""
    values = {"disable_ipv6": "01"[not interface.has_ipv6], "accept_ra": "0", "accept_dad": "0"}
    for key, value in values.items():
        try:
            files.write(f"{_CONF}/{name}/{key}", value)
        except FileNotFoundError:
            continue  # a kernel without IPv6


def _matched(interfaces: tuple[Interface, ...]) -> list[tuple[int, str]]:
    """Index and present name of the device for each interface."""
    devices = sorted(_devices())
    by_mac = {mac: (index, name) for index, name, mac in devices}
    if all(interface.mac in by_mac for interface in interfaces):
        return [by_mac[interface.mac] for interface in interfaces]
    if len(devices) < len(interfaces):
        raise Failure(
            FAILED_PRECONDITION,
            f"The guest has {len(devices)} network devices, and is to have {len(interfaces)} interfaces.",
        )
    return [(index, name) for index, name, _ in devices[: len(interfaces)]]


def _devices() -> list[tuple[int, str, str]]:
    """Index, name and MAC of each network device."""
    return [
        (int(_read(name, "ifindex")), name, _read(name, "address"))
        for name in os.listdir(_NET)
        if os.path.exists(f"{_NET}/{name}/device") and _read(name, "type") == _ETHERNET
    ]


def _read(name: str, attribute: str) -> str:
    return files.read(f"{_NET}/{name}/{attribute}")
