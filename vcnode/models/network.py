"""Networks of pods as callers describe them, and as the node reports them.

`Endpoint`, `NetworkInterfacePair`, `NetworkInterface` and `NetworkNamespace` are those of virtcontainers.
"""

from __future__ import annotations

import ipaddress
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from vcnode.models.base import ID_PATTERN, Reply, Request

MAX_NETWORKS = 8
"""Networks of one pod: one interface each."""
MAX_PORTS = 64
"""Published ports of one pod."""


class NetworkModel(StrEnum):
    """Drivers that connect a pod."""

    NOOP = "noop"
    BRIDGE = "bridge"
    CNI = "cni"
    CNM = "cnm"


class Interworking(StrEnum):
    """How an interface of the pod's namespace is wired to the VM's tap."""

    TC = "tc"
    """Ingress filters that redirect each frame from one to the other."""
    BRIDGED = "bridged"
    """A bridge in the namespace that holds both."""
    MACVTAP = "macvtap"
    """A macvtap on top of the interface; there is no other tap."""


def _address(text: str) -> str:
    return str(ipaddress.ip_address(text))


def _interface(text: str) -> str:
    return str(ipaddress.ip_interface(text))


def _network(text: str) -> str:
    return str(ipaddress.ip_network(text))


IpAddress = Annotated[str, StringConstraints(max_length=64), AfterValidator(_address)]
IpInterface = Annotated[str, StringConstraints(max_length=64), AfterValidator(_interface)]
IpNetwork = Annotated[str, StringConstraints(max_length=64), AfterValidator(_network)]
NetworkName = Annotated[
    str,
    StringConstraints(pattern=ID_PATTERN),
    Field(description="Name of a network: lower case letters, digits, '-' and '_', at most 64."),
]
DomainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9])?$")]


class PortMapping(Request):
    """A port of the host that leads to a port of the pod."""

    host: int = Field(ge=1, le=65535)
    """Port on every address of the host."""
    container: int = Field(ge=1, le=65535)
    """Port in the pod."""
    protocol: Literal["tcp", "udp"] = "tcp"
    """Protocol of both."""


class RateMbit(Request):
    """Limits of one pod's traffic, for each of its interfaces, in 10^6 bits per second."""

    ingress: float | None = Field(default=None, ge=0.01, le=30_000)
    """What the pod receives. Default: no limit."""
    egress: float | None = Field(default=None, ge=0.01, le=30_000)
    """What the pod sends. Default: no limit."""


class DnsConfig(Request):
    """Name resolution in the pod's guest and containers."""

    servers: tuple[IpAddress, ...] = Field(default=(), max_length=8)
    """Name servers. Default: those of the network, or of the node."""
    search: tuple[DomainName, ...] = Field(default=(), max_length=32)
    """Domains in which short names are looked up."""
    options: tuple[Annotated[str, StringConstraints(pattern=r"^[a-z0-9:._-]{1,64}$")], ...] = Field(
        default=(), max_length=16
    )
    """Options as in resolv.conf(5), such as ``ndots:2``."""
    hosts: dict[DomainName, IpAddress] = Field(default={}, max_length=256)
    """Further names for /etc/hosts."""


class NetworkConfig(Request):
    """How a pod is connected; which fields a network model knows is in docs/networks.md."""

    networks: tuple[NetworkName, ...] = Field(default=(), max_length=MAX_NETWORKS)
    """Networks to join, one interface each, in the guest's order; pods reach each other only where they share
    one. Default: the node's own network, in which every pod is alone with the host."""
    netns_path: Annotated[str, StringConstraints(pattern=r"^/[^\x00]{0,4094}$")] | None = None
    """``cnm`` only: the network namespace, made by somebody else, whose interfaces the VM gets."""
    interworking: Interworking = Interworking.TC
    """How the interfaces are wired to the VM."""
    ports: tuple[PortMapping, ...] = Field(default=(), max_length=MAX_PORTS)
    """Published ports; a conflict is refused before anything starts."""
    rate_mbit: RateMbit = RateMbit()
    """Limits of its traffic."""
    dns: DnsConfig = DnsConfig()
    """Name resolution."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.networks)) < len(self.networks):
            raise ValueError("'networks' must be distinct")
        ports = [(port.host, port.protocol) for port in self.ports]
        if len(set(ports)) < len(ports):
            raise ValueError("'ports' must have distinct pairs of host port and protocol")
        return self


class Route(Reply):
    """A route in the guest."""

    destination: str
    """Network with prefix length; ``0.0.0.0/0`` and ``::/0`` are the default routes."""
    gateway: str | None = None
    """Next hop; None: the destination is on the link."""
    on_link: bool = False
    """Whether the gateway is to be taken as on the link, whatever the interface's addresses say."""
    metric: int | None = None
    """Priority; lower wins. None: the kernel's."""


class NetworkInterface(Reply):
    """One interface in the pod's network namespace."""

    name: str
    """Its name."""
    hard_addr: str
    """Its hardware address."""


class NetworkInterfacePair(Reply):
    """An interface that leads out of the namespace, and the one that QEMU holds."""

    id: str
    """Unique within the node."""
    interworking: Interworking
    """How the two are wired to each other."""
    name: str | None = None
    """The bridge between them, where that is how they are wired."""
    virt_iface: NetworkInterface
    """The one that leads out."""
    tap_iface: NetworkInterface
    """The tap, or macvtap."""


class Endpoint(Reply):
    """How one interface of the pod's network namespace reaches the VM."""

    id: str
    """Unique within the node."""
    name: str
    """Interface name in the guest, such as ``eth0``."""
    network: str | None = None
    """Name of the network that it belongs to; None: the node's own, or one without a name."""
    net_pair: NetworkInterfacePair | None = None
    """What it consists of in the namespace."""
    host_interface: str | None = None
    """Interface at the host's end, if the node has made it."""
    mac: str
    """Hardware address of the guest's interface; that of the interface in the namespace."""
    addresses: tuple[str, ...] = ()
    """Addresses of the guest, with prefix length."""
    routes: tuple[Route, ...] = ()
    """Routes through this interface."""
    mtu: int = 1500
    """Maximum transmission unit in bytes."""

    @property
    def tap_name(self) -> str | None:
        """The interface that QEMU holds."""
        return None if self.net_pair is None else self.net_pair.tap_iface.name


class NetworkNamespace(Reply):
    """The namespace in which a pod's VM runs."""

    path: str
    """File that names it."""
    created: bool
    """Whether the node has made it, and removes it with the pod."""
    endpoints: tuple[Endpoint, ...] = ()
    """The VM's interfaces, in the guest's order."""
