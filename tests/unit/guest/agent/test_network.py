"""What ``configure`` says of the network: checked before anything is touched, and written as files."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from vcnode.guest.agent import network
from vcnode.guest.agent.failures import Failure
from vcnode.guest.agent.params import Params

ROUTE = {"destination": "0.0.0.0/0", "gateway": "10.0.0.1", "on_link": False, "metric": None}
INTERFACE: dict[str, Any] = {
    "name": "eth0",
    "mac": "02:00:00:00:00:01",
    "addresses": ["10.0.0.2/24", "fd00::2/64"],
    "mtu": 1500,
    "routes": [ROUTE],
}


def test_an_interface_is_taken_apart():
    interface = network.Interface(INTERFACE, "interfaces[0]")
    assert interface.addresses[0] == (socket.AF_INET, b"\x0a\0\0\2", 24)
    assert interface.addresses[1][0] == socket.AF_INET6
    assert interface.has_ipv6
    (route,) = interface.routes
    assert (route.destination, route.gateway) == ((bytes(4), 0), b"\x0a\0\0\1")


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"name": "../x"}, "interfaces[0].name"),
        ({"name": "a" * 16}, "interfaces[0].name"),
        ({"mac": "02:00"}, "interfaces[0].mac"),
        ({"addresses": ["10.0.0.2"]}, "interfaces[0].addresses[0]"),
        ({"addresses": ["10.0.0.2/33"]}, "interfaces[0].addresses[0]"),
        ({"addresses": [7]}, "interfaces[0].addresses[0]"),
        ({"mtu": 1}, "interfaces[0].mtu"),
        ({"routes": [{**ROUTE, "gateway": "fd00::1"}]}, "interfaces[0].routes[0].gateway"),
        ({"routes": [{**ROUTE, "destination": "x/0"}]}, "interfaces[0].routes[0].destination"),
        ({"routes": [7]}, "interfaces[0].routes[0]"),
        ({"more": 1}, "interfaces[0].more"),
    ],
)
def test_a_wrong_interface_is_refused_by_field(changed: dict[str, Any], field: str):
    with pytest.raises(Failure) as caught:
        network.Interface({**INTERFACE, **changed}, "interfaces[0]")
    assert caught.value.message.startswith(f"{field}:")


def test_files_are_written_as_resolvers_read_them():
    resolver = network.Resolver(
        Params(
            {
                "servers": ["10.0.0.53", "fd00::53"],
                "search": ["a.example", "b.example"],
                "options": ["ndots:2"],
                "hosts": [["db", "10.0.0.9"]],
            }
        )
    )
    assert resolver.resolv_conf() == (
        "nameserver 10.0.0.53\nnameserver fd00::53\nsearch a.example b.example\noptions ndots:2\n"
    )
    hosts = network.hosts_file("web", (network.Interface(INTERFACE, "i"),), resolver)
    assert "10.0.0.2\tweb\n" in hosts
    assert "fd00::2\tweb\n" in hosts
    assert hosts.endswith("10.0.0.9\tdb\n")
    assert "127.0.1.1\tweb\n" in network.hosts_file("web", (), network.Resolver(Params({})))


@pytest.mark.parametrize(
    "changed",
    [
        {"servers": ["x"]},
        {"search": ["a b"]},
        {"search": ["a\nb"]},
        {"hosts": [["a"]]},
        {"hosts": [["a", "b"]]},
    ],
)
def test_a_wrong_resolver_is_refused(changed: dict[str, Any]):
    with pytest.raises(Failure):
        network.Resolver(Params(changed))
