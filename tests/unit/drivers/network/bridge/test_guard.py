"""The guard's program, run by an interpreter; that the kernel agrees is shown with real frames."""

from __future__ import annotations

import ipaddress

import pytest

from tests.unit.drivers.network import frames
from vcnode.drivers.network.bpf import OK, SHOT
from vcnode.drivers.network.bridge import guard

MAC, GATEWAY, OTHER = "02:11:22:33:44:55", "02:aa:aa:aa:aa:aa", "02:99:99:99:99:99"
SUBNETS = (ipaddress.ip_network("10.119.0.0/16"), ipaddress.ip_network("fd00::/64"))
BOTH = guard.Identity.of(MAC, ("10.119.3.7/17", "fd00::307/113"), GATEWAY, ("10.119.0.1", "fd00::1"), SUBNETS)
V4 = guard.Identity.of(MAC, ("10.119.3.7/17",), GATEWAY, ("10.119.0.1",), SUBNETS[:1])
V6 = guard.Identity.of(MAC, ("fd00::307/113",), GATEWAY, ("fd00::1",), SUBNETS[1:])
LL = "fe80::11:22ff:fe33:4455"
OWN6 = "fd00::307"
PING6 = frames.icmp6(MAC, GATEWAY, OWN6, "fd00::1", 128, bytes(8))
ROUTER = frames.icmp6(MAC, "33:33:00:00:00:01", LL, "ff02::1", 134, bytes(12))
CLAIM = frames.advertisement(MAC, OWN6, "fd00::1")

PASS = {
    "arp": frames.arp(MAC, MAC, "10.119.3.7", "10.119.0.1"),
    "to the gateway": frames.udp4(MAC, GATEWAY, "10.119.3.7", "10.119.0.1"),
    "to the outside": frames.udp4(MAC, GATEWAY, "10.119.3.7", "192.0.2.1"),
    "to a neighbour": frames.udp4(MAC, OTHER, "10.119.3.7", "10.119.3.8"),
    "ping6 to the gateway": frames.icmp6(MAC, GATEWAY, OWN6, "fd00::1", 128, bytes(8)),
    "ping6 from link-local": frames.icmp6(MAC, GATEWAY, LL, "fe80::1", 128, bytes(8)),
    "ping6 to the outside": frames.icmp6(MAC, GATEWAY, OWN6, "2001:db8::1", 128, bytes(8)),
    "ping6 to a neighbour": frames.icmp6(MAC, OTHER, OWN6, "fd00::308", 128, bytes(8)),
    "solicitation": frames.icmp6(MAC, "33:33:ff:00:00:01", OWN6, "ff02::1:ff00:1", 135, bytes(20)),
    "advertisement": frames.advertisement(MAC, OWN6, OWN6),
    "advertisement of link-local": frames.advertisement(MAC, LL, LL),
    "first fragment": frames.fragment(PING6, more=True),
    "another fragment": frames.fragment(PING6, offset=181),
}
DROP = {
    "another MAC": frames.udp4(OTHER, GATEWAY, "10.119.3.7", "10.119.0.1"),
    "another address": frames.udp4(MAC, GATEWAY, "10.119.3.8", "10.119.0.1"),
    "no address": frames.udp4(MAC, GATEWAY, "0.0.0.0", "255.255.255.255"),
    "another pod by the gateway": frames.udp4(MAC, GATEWAY, "10.119.3.7", "10.119.200.9"),
    "arp for another address": frames.arp(MAC, MAC, "10.119.0.1", "10.119.3.9"),
    "arp for another MAC": frames.arp(MAC, OTHER, "10.119.3.7", "10.119.3.9"),
    "another address of IPv6": frames.icmp6(MAC, GATEWAY, "fd00::308", "fd00::1", 128, bytes(8)),
    "another pod by the gateway, IPv6": frames.icmp6(MAC, GATEWAY, OWN6, "fd00::9999", 128, bytes(8)),
    "the same from link-local": frames.icmp6(MAC, GATEWAY, LL, "fd00::9999", 128, bytes(8)),
    "router advertisement": frames.icmp6(MAC, "33:33:00:00:00:01", LL, "ff02::1", 134, bytes(12)),
    "redirect": frames.icmp6(MAC, GATEWAY, LL, "fd00::1", 137, bytes(36)),
    "advertisement of another": frames.advertisement(MAC, OWN6, "fd00::1"),
    **{f"router advertisement behind header {kind}": frames.extended(ROUTER, kind) for kind in (0, 43, 60)},
    **{f"claim behind header {kind}": frames.extended(CLAIM, kind) for kind in (0, 43, 60)},
    "claim in a fragment": frames.fragment(CLAIM),
    "claim in fragments": frames.fragment(CLAIM, more=True),
    "claim behind a header in a fragment": frames.fragment(frames.extended(CLAIM, 60)),
    "claim in a fragment of a fragment": frames.fragment(frames.fragment(CLAIM)),
    "another pod by the gateway, in a fragment": frames.fragment(
        frames.icmp6(MAC, GATEWAY, OWN6, "fd00::9999", 128, bytes(8)), offset=3
    ),
    "cut off in a fragment": frames.fragment(CLAIM)[:60],
    "another protocol": frames.ethernet(MAC, GATEWAY, 0x88CC, bytes(40)),
    "a frame within a frame": frames.ethernet(MAC, GATEWAY, 0x8100, bytes(40)),
    "cut off in ARP": frames.arp(MAC, MAC, "10.119.0.1", "10.119.3.9")[:30],
    "cut off in IPv4": frames.udp4(MAC, GATEWAY, "10.119.3.8", "10.119.0.1")[:28],
    "cut off in IPv6": frames.icmp6(MAC, GATEWAY, "fd00::308", "fd00::1", 128)[:30],
    "cut off before the type": frames.icmp6(MAC, GATEWAY, OWN6, "fd00::1", 134)[:54],
    "cut off in an advertisement": frames.advertisement(MAC, OWN6, "fd00::1")[:70],
    "nothing": b"",
}


@pytest.mark.parametrize("name", PASS)
def test_what_a_pod_may_send_passes(name: str):
    assert frames.run(guard.program(BOTH), PASS[name]) == OK


@pytest.mark.parametrize("name", DROP)
def test_what_a_pod_may_not_send_is_dropped(name: str):
    assert frames.run(guard.program(BOTH), DROP[name]) == SHOT


def test_a_family_that_the_pod_does_not_have_is_dropped():
    assert frames.run(guard.program(V4), PASS["arp"]) == OK
    assert frames.run(guard.program(V4), PASS["ping6 from link-local"]) == SHOT
    assert frames.run(guard.program(V6), PASS["advertisement"]) == OK
    assert frames.run(guard.program(V6), PASS["arp"]) == SHOT
    assert frames.run(guard.program(V6), PASS["to the outside"]) == SHOT


def test_the_link_local_address_follows_from_the_mac():
    assert str(BOTH.link_local) == LL
