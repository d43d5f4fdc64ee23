"""What may leave a pod: a program at the exit of its namespace. Pure.

It is the last thing that a frame passes before the pod's interface, however tap and interface are wired, and
lets through only what a pod may say:

- frames with its own MAC as source, of ARP, IPv4 and IPv6 only;
- with its own addresses as source, and in ARP and neighbour advertisements no others as its own;
- no router advertisement, no redirect, and nothing behind extension headers or in fragments where one of
  these could hide (RFC 7113, section 2);
- through the gateway to anywhere, but not to other pods: those are reached directly, where a network is
  shared, or not at all.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vcnode.drivers.network.bpf import (
    MATCH,
    NO_MATCH,
    OK,
    SHOT,
    And,
    Instruction,
    Jump,
    JumpIf,
    JumpUnlessAtLeast,
    Label,
    Load,
    LoadLength,
    Return,
    assemble,
)

_ARP, _IPV4, _IPV6, _ICMPV6 = 0x0806, 0x0800, 0x86DD, 58
_FRAGMENT, _OTHER_EXTENSIONS = 44, (0, 43, 60)
"""Extension headers: hop-by-hop options, routing, destination options. Source: RFC 8200, section 4."""
_ROUTER_ADVERTISEMENT, _NEIGHBOUR_ADVERTISEMENT, _REDIRECT = 134, 136, 137
_NEIGHBOUR_DISCOVERY = range(133, 138)
"""Types of ICMPv6 that nobody may cut into fragments. Source: RFC 6980."""

# Offsets from the start of the frame. Source: RFC 826, RFC 791, RFC 8200, RFC 4861.
_DST_MAC, _SRC_MAC, _TYPE, _PAYLOAD = 0, 6, 12, 14
_ARP_SENDER_MAC, _ARP_SENDER_IP = _PAYLOAD + 8, _PAYLOAD + 14
_V4_SRC, _V4_DST = _PAYLOAD + 12, _PAYLOAD + 16
_V6_NEXT, _V6_SRC, _V6_DST, _V6_BODY = _PAYLOAD + 6, _PAYLOAD + 8, _PAYLOAD + 24, _PAYLOAD + 40


@dataclass(frozen=True, slots=True)
class Identity:
    """What one interface of a pod may use."""

    mac: str
    v4: ipaddress.IPv4Interface | None
    v6: ipaddress.IPv6Interface | None
    gateway_mac: str
    """The bridge's."""
    gateways: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, ...]
    """The host's addresses on that bridge."""
    subnets: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]
    """All addresses that pods of the node may have."""

    @classmethod
    def of(
        cls,
        mac: str,
        addresses: Sequence[str],
        gateway_mac: str,
        gateways: Sequence[str],
        subnets: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network],
    ) -> Identity:
        """The identity of an interface with these addresses, at most one of a family."""
        interfaces = [ipaddress.ip_interface(address) for address in addresses]
        return cls(
            mac=mac,
            v4=next((i for i in interfaces if isinstance(i, ipaddress.IPv4Interface)), None),
            v6=next((i for i in interfaces if isinstance(i, ipaddress.IPv6Interface)), None),
            gateway_mac=gateway_mac,
            gateways=tuple(ipaddress.ip_address(gateway) for gateway in gateways),
            subnets=tuple(subnets),
        )

    @property
    def link_local(self) -> ipaddress.IPv6Address:
        """The address that the guest's kernel makes of the MAC. Source: RFC 4291, appendix A."""
        octets = bytes.fromhex(self.mac.replace(":", ""))
        host = bytes((octets[0] ^ 2, *octets[1:3], 0xFF, 0xFE, *octets[3:]))
        return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + host)


def program(identity: Identity) -> bytes:
    """The program that drops what *identity* may not send, for `bpf`'s kind of filter."""
    return assemble(tuple(instructions(identity)))


def sent_to(mac: str) -> bytes:
    """A program that matches frames to *mac*, for a filter that has an action."""
    return assemble(
        (
            *_at_least(_PAYLOAD),
            *_mac(_DST_MAC, mac, otherwise="drop"),
            Return(MATCH),
            Label("drop"),
            Return(NO_MATCH),
        )
    )


def instructions(identity: Identity) -> Iterator[Instruction]:
    """The program, before it is assembled."""
    yield from _at_least(_PAYLOAD)
    yield from _mac(_SRC_MAC, identity.mac, otherwise="drop")
    yield Load(_TYPE, 2)
    if identity.v4 is not None:
        yield JumpIf(_ARP, "arp")
        yield JumpIf(_IPV4, "ipv4")
    if identity.v6 is not None:
        yield JumpIf(_IPV6, "ipv6")
    yield Jump("drop")
    if identity.v4 is not None:
        yield from _from_v4(identity, identity.v4)
    if identity.v6 is not None:
        yield from _from_v6(identity, identity.v6)
    yield Label("drop")
    yield Return(SHOT)
    yield Label("pass")
    yield Return(OK)


def _from_v4(identity: Identity, own: ipaddress.IPv4Interface) -> Iterator[Instruction]:
    yield Label("arp")
    yield from _at_least(_PAYLOAD + 28)
    yield from _mac(_ARP_SENDER_MAC, identity.mac, otherwise="drop")
    yield Load(_ARP_SENDER_IP)
    yield JumpIf(int(own.ip), "pass", "drop")
    yield Label("ipv4")
    yield from _at_least(_PAYLOAD + 20)
    yield from _words(_V4_SRC, own.ip.packed, otherwise="drop")
    yield from _routed(identity, _V4_DST, 4)


def _from_v6(identity: Identity, own: ipaddress.IPv6Interface) -> Iterator[Instruction]:
    yield Label("ipv6")
    yield from _at_least(_V6_BODY)
    yield from _words(_V6_SRC, own.ip.packed, otherwise="v6-link-local")
    yield Jump("v6-source-right")
    yield Label("v6-link-local")
    yield from _words(_V6_SRC, identity.link_local.packed, otherwise="drop")
    yield Label("v6-source-right")
    yield Load(_V6_NEXT, 1)
    yield JumpIf(_ICMPV6, "v6-icmp")
    yield from _none_of(_OTHER_EXTENSIONS)
    yield JumpIf(_FRAGMENT, None, "v6-routed")
    yield from _fragment()
    yield Label("v6-icmp")
    yield from _at_least(_V6_BODY + 1)
    yield Load(_V6_BODY, 1)
    yield JumpIf(_ROUTER_ADVERTISEMENT, "drop")
    yield JumpIf(_REDIRECT, "drop")
    yield JumpIf(_NEIGHBOUR_ADVERTISEMENT, None, "v6-routed")
    target = _V6_BODY + 8
    yield from _at_least(target + 16)
    yield from _words(target, own.ip.packed, otherwise="v6-target-link-local")
    yield Jump("pass")
    yield Label("v6-target-link-local")
    yield from _words(target, identity.link_local.packed, otherwise="drop")
    yield Jump("pass")
    yield Label("v6-routed")
    yield from _routed(identity, _V6_DST, 6)


def _fragment() -> Iterator[Instruction]:
    """Go on to where it is routed, unless it could become neighbour discovery when it is whole again."""
    yield from _at_least(_V6_BODY + 9)
    yield Load(_V6_BODY, 1)
    yield from _none_of((*_OTHER_EXTENSIONS, _FRAGMENT))
    yield JumpIf(_ICMPV6, None, "v6-routed")
    yield Load(_V6_BODY + 2, 2)
    yield And(0xFFF8)
    yield JumpIf(0, None, "v6-routed")  # the type is in the first one
    yield Load(_V6_BODY + 8, 1)
    yield from _none_of(_NEIGHBOUR_DISCOVERY)
    yield Jump("v6-routed")


def _none_of(values: Iterable[int]) -> Iterator[Instruction]:
    """Drop the frame when what was loaded is one of *values*."""
    for value in values:
        yield JumpIf(value, "drop")


def _routed(identity: Identity, offset: int, version: int) -> Iterator[Instruction]:
    """Pass, unless the frame goes to the gateway's MAC and on to an address that may be a pod's."""
    yield from _mac(_DST_MAC, identity.gateway_mac, otherwise="pass")
    for number, gateway in enumerate(g for g in identity.gateways if g.version == version):
        yield from _words(offset, gateway.packed, otherwise=f"v{version}-not-gateway-{number}")
        yield Jump("pass")
        yield Label(f"v{version}-not-gateway-{number}")
    for number, subnet in enumerate(s for s in identity.subnets if s.version == version):
        mask, prefix = subnet.netmask.packed, subnet.network_address.packed
        yield from _words(offset, prefix, mask=mask, otherwise=f"v{version}-outside-{number}")
        yield Jump("drop")
        yield Label(f"v{version}-outside-{number}")
    yield Jump("pass")


def _at_least(length: int) -> Iterator[Instruction]:
    """Go on when the frame is so long."""
    yield LoadLength()
    yield JumpUnlessAtLeast(length, "drop")


def _mac(offset: int, mac: str, *, otherwise: str) -> Iterator[Instruction]:
    """Go on when the MAC at *offset* is *mac*."""
    octets = bytes.fromhex(mac.replace(":", ""))
    yield Load(offset)
    yield JumpIf(int.from_bytes(octets[:4], "big"), None, otherwise)
    yield Load(offset + 4, 2)
    yield JumpIf(int.from_bytes(octets[4:], "big"), None, otherwise)


def _words(offset: int, value: bytes, *, mask: bytes | None = None, otherwise: str) -> Iterator[Instruction]:
    """Go on when what stands at *offset* is *value*, in the bits of *mask*."""
    for at in range(0, len(value), 4):
        bits = 0xFFFFFFFF if mask is None else int.from_bytes(mask[at : at + 4], "big")
        if bits:
            yield Load(offset + at)
            if bits != 0xFFFFFFFF:
                yield And(bits)
            yield JumpIf(int.from_bytes(value[at : at + 4], "big") & bits, None, otherwise)
