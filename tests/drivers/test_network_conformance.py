"""What every network promises (drivers/base.py), held against the mock and the real ones.

The real ones work in a network that the test has made for itself.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.netns import private_network
from vcnode.drivers import namespaces
from vcnode.drivers.audit import Auditable
from vcnode.drivers.base import Network
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.network.bridge import BridgeNetwork, Nft
from vcnode.drivers.network.cni import CniNetwork
from vcnode.drivers.network.mock import MockNetwork
from vcnode.drivers.network.noop import NoopNetwork
from vcnode.errors import FailedPreconditionError, InvalidArgumentError, NetworkError
from vcnode.models.network import Interworking, NetworkConfig, NetworkModel, PortMapping, RateMbit
from vcnode.models.vm import NetworkAttachment, NetworkRequest
from vcnode.settings import BridgeSettings, CniSettings

LIMIT_S = 20.0
DEFAULT = NetworkConfig()
EVERYTHING = NetworkConfig(
    networks=("blue", "red"),
    ports=(PortMapping(host=8080, container=80),),
    rate_mbit=RateMbit(ingress=100, egress=50),
)


class Host:
    """A network on a host where nothing else is, and what it has left there."""

    def __init__(self, network: Network, mark: str) -> None:
        self.network = network
        self.mark = mark
        self._count = 0

    def plan(
        self, config: NetworkConfig = DEFAULT, held: tuple[NetworkAttachment, ...] = ()
    ) -> NetworkAttachment:
        """A plan for a new pod."""
        self._count += 1
        request = NetworkRequest(
            pod_id=f"p{self._count}", vm_id=f"{self.mark}{self._count:07x}", config=config
        )
        return self.network.plan(request, held)

    async def held(self) -> set[str]:
        """VMs for which something is held."""
        if not isinstance(self.network, Auditable):
            return set()
        return {h.vm_id for h in await self.network.held(self.mark) if h.vm_id is not None}


@pytest.fixture
def mark() -> str:
    return f"vm-{secrets.token_hex(3)[:5]}"


@pytest.fixture
def own_network() -> Iterator[None]:
    with private_network():
        yield


@pytest.fixture(
    params=[
        "noop",
        "mock",
        "mock-cni",
        pytest.param("bridge", marks=pytest.mark.root),
        pytest.param("cni", marks=pytest.mark.root),
    ],
)
async def host(request: pytest.FixtureRequest, mark: str, tmp_path: Path) -> AsyncIterator[Host]:
    network: Network
    if request.param == "noop":
        network = NoopNetwork(FaultPlan.parse(""))
    elif request.param == "mock":
        network = MockNetwork(FaultPlan.parse(""))
    elif request.param == "mock-cni":
        network = MockNetwork(FaultPlan.parse(""), model=NetworkModel.CNI)
    elif request.param == "cni":
        request.getfixturevalue("own_network")
        network = cni_network(tmp_path)
    else:
        request.getfixturevalue("own_network")
        network = BridgeNetwork(BridgeSettings(), mark, Nft.find())
    await network.open()
    host = Host(network, mark)
    yield host
    assert await host.held() == set()
    await network.close()
    if request.param in ("bridge", "cni"):
        bridges = {"cni0", "cni1", "cni2"}  # of the plugins, which keep them
        assert {name for _, name in socket.if_nameindex()} - bridges == {"lo"}
        assert namespaces.names(mark) == []


def cni_network(directory: Path) -> CniNetwork:
    """Three networks of Debian's plugins."""
    for number, name in enumerate(("a-default", "blue", "red")):
        subnet = {
            "type": "host-local",
            "dataDir": str(directory / "leases"),
            "subnet": f"10.77.{number}.0/24",
        }
        plugins = [
            {"type": "bridge", "bridge": f"cni{number}", "isGateway": True, "ipam": subnet},
            {"type": "portmap", "capabilities": {"portMappings": True}},
            {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        ]
        # CHECK of these versions of portmap and bandwidth fails, whatever there is.
        conf = {"cniVersion": "0.4.0", "name": name, "disableCheck": True, "plugins": plugins}
        (directory / f"{name}.conflist").write_text(json.dumps(conf))
    return CniNetwork(CniSettings(conf_dir=directory), directory / "state")


def config_of(host: Host, config: NetworkConfig = EVERYTHING) -> NetworkConfig:
    """*config*, where the network knows what is in it."""
    return NetworkConfig() if host.network.info.type == NetworkModel.NOOP else config


def _needs_spares(network: Network) -> None:
    if "spares" not in network.info.capabilities:
        pytest.skip("it makes nothing for VMs without a pod")


async def test_what_is_attached_can_be_opened_and_detached_twice(host: Host):
    network = host.network
    planned = host.plan(config_of(host))
    attached = await network.attach(planned, timeout_s=LIMIT_S)
    if planned.endpoints:  # else its addresses come with its interfaces
        assert attached == planned
    assert len(attached.endpoints) == network.netdev_count(attached.config)
    taps = await network.open_taps(attached)
    assert len(taps) == len(attached.endpoints)
    for fd in taps:
        os.close(fd)
    await network.recover(attached, timeout_s=LIMIT_S)
    for _ in range(2):
        await network.detach(attached, timeout_s=LIMIT_S)


async def test_an_attachment_survives_its_record(host: Host):
    planned = host.plan(config_of(host))
    again = NetworkAttachment.model_validate_json(planned.model_dump_json())
    assert again == planned
    await host.network.attach(again, timeout_s=LIMIT_S)
    await host.network.detach(planned, timeout_s=LIMIT_S)


async def test_the_id_of_the_vm_is_enough_to_detach(host: Host):
    planned = host.plan(config_of(host))
    await host.network.attach(planned, timeout_s=LIMIT_S)
    if isinstance(host.network, Auditable):
        assert await host.held() == {planned.vm_id}
    bare = NetworkAttachment(model=planned.model, vm_id=planned.vm_id)
    for _ in range(2):
        await host.network.detach(bare, timeout_s=LIMIT_S)


async def test_what_was_never_attached_can_be_detached(host: Host):
    await host.network.detach(host.plan(), timeout_s=LIMIT_S)


async def test_a_prepared_vm_becomes_a_pods(host: Host):
    network = host.network
    _needs_spares(network)
    planned = host.plan()
    count = network.netdev_count(NetworkConfig())
    assert count is not None
    prepared = await network.prepare(planned.vm_id, count, timeout_s=LIMIT_S)
    assert prepared.netns_path == planned.netns_path
    taps = await network.open_taps(prepared)
    assert len(taps) == count
    attached = await network.attach(planned, timeout_s=LIMIT_S)
    assert attached == planned
    for fd in taps:
        os.close(fd)
    await network.detach(attached, timeout_s=LIMIT_S)


async def test_a_prepared_vm_that_nobody_takes_leaves_nothing(host: Host):
    _needs_spares(host.network)
    prepared = await host.network.prepare(f"{host.mark}0000001", 1, timeout_s=LIMIT_S)
    for _ in range(2):
        await host.network.detach(prepared, timeout_s=LIMIT_S)


async def test_what_is_held_can_be_freed_one_by_one(host: Host):
    network = host.network
    if not isinstance(network, Auditable):
        pytest.skip("it makes nothing")
    first, second = host.plan(config_of(host)), host.plan()
    for planned in (first, second):
        await network.attach(planned, timeout_s=LIMIT_S)
    for held in await network.held(host.mark):
        if held.vm_id == first.vm_id:
            await network.free(held, timeout_s=LIMIT_S)
    assert await host.held() == {second.vm_id}
    await network.recover(second, timeout_s=LIMIT_S)
    assert await network.held("vm-none0") == [h for h in await network.held("vm-none0") if h.vm_id is None]
    await network.detach(second, timeout_s=LIMIT_S)


async def test_addresses_and_ports_are_taken_as_long_as_they_are_held(host: Host):
    if host.network.info.type == NetworkModel.NOOP:
        pytest.skip("it has neither")
    web = NetworkConfig(ports=(PortMapping(host=8080, container=80),))
    first = host.plan(web)
    others = [host.plan(held=(first,)) for _ in range(20)]
    if first.endpoints:
        assert all(o.endpoints[0].addresses != first.endpoints[0].addresses for o in others)
    with pytest.raises(FailedPreconditionError):
        host.plan(web, held=(first,))
    host.plan(web, held=tuple(others))


def test_a_namespace_of_somebody_else_is_refused_by_all_but_cnm(host: Host):
    with pytest.raises(InvalidArgumentError):
        host.network.check(NetworkConfig(netns_path="/run/netns/x"))


async def test_taps_of_what_is_gone_cannot_be_opened(host: Host):
    planned = host.plan()
    if not planned.endpoints:
        pytest.skip("it has no taps")
    with pytest.raises(NetworkError):
        await host.network.open_taps(planned)
    with pytest.raises(NetworkError):
        await host.network.recover(planned, timeout_s=LIMIT_S)


@pytest.mark.parametrize("mode", list(Interworking))
async def test_every_interworking_can_be_attached_and_opened(host: Host, mode: Interworking):
    if host.network.info.type == NetworkModel.NOOP:
        pytest.skip("it has no interface")
    planned = host.plan(NetworkConfig(interworking=mode))
    attached = await host.network.attach(planned, timeout_s=LIMIT_S)
    if planned.endpoints:
        assert attached == planned
    for fd in await host.network.open_taps(attached):
        os.close(fd)
    await host.network.detach(attached, timeout_s=LIMIT_S)


def test_the_mock_of_cnm_wants_a_namespace_that_is_nobody_elses():
    network = MockNetwork(FaultPlan.parse(""), model=NetworkModel.CNM)
    given = NetworkConfig(netns_path="/run/netns/x")
    planned = network.plan(NetworkRequest(pod_id="p1", vm_id="vm-000000000001", config=given), ())
    assert (planned.netns_path, planned.netns_created) == ("/run/netns/x", False)
    with pytest.raises(FailedPreconditionError, match="is pod p1's"):
        network.plan(NetworkRequest(pod_id="p2", vm_id="vm-000000000002", config=given), (planned,))
    for refused in (NetworkConfig(), given.model_copy(update={"networks": ("a",)})):
        with pytest.raises(InvalidArgumentError):
            network.check(refused)
