"""vcnode.pods.guests: addresses for guests that nobody could tell them."""

from __future__ import annotations

from vcnode.models.network import DnsConfig, Endpoint, Route
from vcnode.pods.guests import address_params


def endpoint(name: str, *addresses: str, gateway: str | None = None) -> Endpoint:
    routes = () if gateway is None else (Route(destination="0.0.0.0/0", gateway=gateway),)
    return Endpoint(id=name, name=name, mac="02:00:00:00:00:01", addresses=addresses, routes=routes)


def test_each_interface_with_an_ipv4_address_has_a_parameter():
    endpoints = (
        endpoint("eth0", "fd00::2/64", "10.1.2.3/24", gateway="10.1.2.1"),
        endpoint("eth1", "192.0.2.9/28"),
        endpoint("eth2", "fd00::3/64"),
    )
    dns = DnsConfig(servers=("10.1.2.1", "fd00::1", "10.1.2.2"))
    assert address_params(endpoints, "web", dns) == (
        "ip=10.1.2.3::10.1.2.1:255.255.255.0:web:eth0:none:10.1.2.1",
        "ip=192.0.2.9:::255.255.255.240:web:eth1:none:10.1.2.1",
        "net.ifnames=0",
    )


def test_without_addresses_nothing_is_said():
    assert address_params((endpoint("eth0", "fd00::3/64"),), "web", DnsConfig()) == ()
    assert address_params((), "web", DnsConfig()) == ()
