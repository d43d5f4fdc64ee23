"""Places: chosen anew from records each time, never twice."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcnode.drivers.network import ipam
from vcnode.drivers.network.ipam import Slice, Subnets
from vcnode.errors import FailedPreconditionError, ResourceExhaustedError
from vcnode.models.network import Endpoint, NetworkConfig, NetworkModel, PortMapping
from vcnode.models.vm import NetworkAttachment, NetworkRequest

BOTH = Subnets(ipaddress.IPv4Network("10.119.0.0/16"), ipaddress.IPv6Network("fd00::/64"))
SMALL = Subnets(ipaddress.IPv4Network("10.0.0.0/28"), None)


def endpoint_of(subnets: Subnets):
    def make(index: int, network: str | None, part: Slice, place: int) -> Endpoint:
        return Endpoint(
            id=f"x-{index}",
            name=f"eth{index}",
            mac="",
            network=network,
            addresses=subnets.addresses(place, part),
        )

    return make


def attach(subnets: Subnets, number: int, held: list[NetworkAttachment], *networks: str) -> NetworkAttachment:
    request = NetworkRequest(
        pod_id=f"p{number}", vm_id=f"vm-{number}", config=NetworkConfig(networks=networks)
    )
    made = NetworkAttachment(
        model=NetworkModel.BRIDGE,
        vm_id=request.vm_id,
        pod_id=request.pod_id,
        endpoints=ipam.place_endpoints(subnets, request, held, endpoint_of(subnets)),
    )
    held.append(made)
    return made


def test_a_pod_has_the_same_place_in_each_subnet():
    (endpoint,) = attach(BOTH, 1, []).endpoints
    v4, v6 = (ipaddress.ip_interface(a) for a in endpoint.addresses)
    assert (v4.network.prefixlen, v6.network.prefixlen) == (17, 113)
    assert int(v4.ip) & 0xFFFF == int(v6.ip) & 0xFFFF
    assert BOTH.gateways(BOTH.slice_of(None, [])) == ("10.119.0.1", "fd00::1")


def test_a_subnet_is_used_up_and_says_so():
    held: list[NetworkAttachment] = []
    for number in range(5):  # of eight places: not the subnet, the gateway, the broadcast
        attach(SMALL, number, held)
    addresses = {a for h in held for e in h.endpoints for a in e.addresses}
    assert addresses == {f"10.0.0.{n}/29" for n in range(2, 7)}
    with pytest.raises(ResourceExhaustedError):
        attach(SMALL, 99, held)
    gone = held.pop(0)
    assert attach(SMALL, 100, held).endpoints[0].addresses == gone.endpoints[0].addresses


def test_pods_of_one_network_share_a_slice_and_other_networks_have_others():
    held: list[NetworkAttachment] = []
    for number, networks in enumerate([("blue",), ("blue", "red"), ("red", "green"), ()]):
        attach(BOTH, number, held, *networks)
    subnets: dict[str | None, set[str]] = {}
    for endpoint in (e for h in held for e in h.endpoints):
        network = str(ipaddress.ip_interface(endpoint.addresses[0]).network)
        subnets.setdefault(endpoint.network, set()).add(network)
    assert all(len(found) == 1 for found in subnets.values())
    assert len(set.union(*subnets.values())) == 4
    assert subnets[None] == {"10.119.0.0/17"}


def test_networks_are_used_up_and_say_so():
    held: list[NetworkAttachment] = []
    attach(SMALL, 1, held, "blue")
    with pytest.raises(ResourceExhaustedError, match="networks"):
        attach(SMALL, 2, held, "red")


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["", "a", "b", "c", "ab"])), max_size=40))
def test_no_two_pods_ever_have_the_same_place(history: list[tuple[bool, str]]):
    held: list[NetworkAttachment] = []
    for number, (comes, networks) in enumerate(history):
        if comes:
            attach(BOTH, number, held, *networks)
        elif held:
            held.pop(0)
        addresses = [a for h in held for e in h.endpoints for a in e.addresses]
        assert len(set(addresses)) == len(addresses)


def test_a_port_of_another_pod_is_refused_by_name():
    held = [
        NetworkAttachment(
            model=NetworkModel.BRIDGE,
            vm_id="vm-1",
            pod_id="web",
            config=NetworkConfig(ports=(PortMapping(host=80, container=8080),)),
        )
    ]
    ipam.check_ports(NetworkConfig(ports=(PortMapping(host=80, container=1, protocol="udp"),)), held)
    with pytest.raises(FailedPreconditionError, match="pod web's") as caught:
        ipam.check_ports(NetworkConfig(ports=(PortMapping(host=80, container=1),)), held)
    assert caught.value.details["field"] == "pod.network.ports[0].host"


def test_macs_are_local_and_differ():
    macs = {ipam.mac_of(f"vm-{n}", i) for n in range(100) for i in range(3)}
    assert len(macs) == 300
    assert all(mac.startswith("02:") for mac in macs)
