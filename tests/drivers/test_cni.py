"""The cni driver over Debian's plugins, and over some that misbehave; in a network of the test's own."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import networks
from tests.support.cni import RESULT, Plugins, failure
from tests.support.peers import Peer, connection, peer, transfer
from vcnode.drivers import namespaces
from vcnode.drivers.network import taps
from vcnode.drivers.network.cni import CniNetwork
from vcnode.errors import FailedPreconditionError, InvalidArgumentError, NetworkError, UnsupportedError
from vcnode.models.network import DnsConfig, Interworking, NetworkConfig, PortMapping, RateMbit
from vcnode.models.vm import NetworkAttachment, NetworkRequest
from vcnode.settings import CniSettings

pytestmark = pytest.mark.root

LIMIT_S = 30.0
REAL = Path("/usr/lib/cni")


class Host:
    """A host with plugins, configurations, and a state directory, below one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.conf_dir = directory / "net.d"
        self.conf_dir.mkdir()
        self.plugins = Plugins(directory / "bin")
        self.mark = f"vm-{secrets.token_hex(3)[:5]}"
        self.network("10-first")

    def network(
        self, file: str, *more: dict[str, Any], name: str = "first", subnet: int = 1, **fields: Any
    ) -> None:
        """Write a configuration: a bridge, and *more* plugins."""
        bridge = {
            "type": "bridge",
            "bridge": f"cni{subnet}",
            "isGateway": True,
            "ipMasq": True,
            "mtu": 1400,
            "capabilities": {"mac": True},
            "ipam": {
                "type": "host-local",
                "dataDir": str(self.directory / "leases"),
                "ranges": [[{"subnet": f"10.77.{subnet}.0/24"}], [{"subnet": f"fd77:{subnet}::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
            "dns": {"nameservers": ["10.77.0.53"], "search": ["pods.example"]},
        }
        plugins = [bridge, *more]
        conf = {"cniVersion": "1.0.0", "name": name, "plugins": plugins} | fields
        (self.conf_dir / f"{file}.conflist").write_text(json.dumps(conf))

    def driver(self, **settings: Any) -> CniNetwork:
        """A driver as a node agent that has just started has it."""
        found = CniSettings(conf_dir=self.conf_dir, bin_dirs=(self.plugins.directory, REAL), **settings)
        return CniNetwork(found, self.directory / "state")

    def plan(self, driver: CniNetwork, **config: Any) -> NetworkAttachment:
        vm_id = f"{self.mark}{secrets.token_hex(4)[:7]}"
        return driver.plan(NetworkRequest(pod_id="web", vm_id=vm_id, config=NetworkConfig(**config)), ())

    def leases(self) -> list[str]:
        """Addresses that host-local holds."""
        return sorted(
            path.name.removeprefix("fd77_")
            for path in self.directory.glob("leases/*/*")
            if path.name[0].isdigit()
        )

    def kept(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob("state/cni/*"))

    def left(self) -> dict[str, Any]:
        """What is there of any pod; the bridges stay, as CNI has it."""
        rules = networks.run("iptables", "-t", "nat", "-S").splitlines()
        return {
            "leases": self.leases(),
            "kept": self.kept(),
            "links": sorted(name for name in networks.links() if not name.startswith("cni")),
            "namespaces": sorted(n for n in networks.own_namespaces() if n.startswith(self.mark)),
            "rules": [rule for rule in rules if "10.77." in rule or "CNI-DN" in rule],
        }


NOTHING = {"leases": [], "kept": [], "links": [], "namespaces": [], "rules": []}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with networks.own_network():
        made = Host(tmp_path)
        yield made
        for name in namespaces.names(made.mark):
            namespaces.remove(name)


PORTMAP = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
BANDWIDTH = {"type": "bandwidth", "capabilities": {"bandwidth": True}}


async def attach(driver: CniNetwork, planned: NetworkAttachment) -> NetworkAttachment:
    return await driver.attach(planned, timeout_s=LIMIT_S)


async def detach(driver: CniNetwork, attachment: NetworkAttachment) -> None:
    await driver.detach(attachment, timeout_s=LIMIT_S)


@pytest.mark.parametrize("mode", list(Interworking))
async def test_pod_gets_what_the_plugins_made(mode: Interworking, host: Host) -> None:
    # This version of portmap looks for rules of IPv4 among those of IPv6.
    host.network("10-first", PORTMAP, BANDWIDTH, disableCheck=True)
    driver = host.driver()
    await driver.open()
    assert driver.info.capabilities == ("ports", "rate_mbit")
    planned = host.plan(
        driver,
        interworking=mode,
        ports=(PortMapping(host=8080, container=80),),
        rate_mbit=RateMbit(ingress=8),
    )
    made = await attach(driver, planned)
    [endpoint] = made.endpoints
    assert (endpoint.name, endpoint.network, endpoint.mtu) == ("eth0", "first", 1400)
    assert endpoint.addresses == ("10.77.1.2/24", "fd77:1::2/64")
    routes = {(route.destination, route.gateway) for route in endpoint.routes}
    assert routes == {("0.0.0.0/0", "10.77.1.1"), ("::/0", "fd77:1::1")}
    assert (made.dns.servers, made.dns.search) == (("10.77.0.53",), ("pods.example",))
    path = made.netns_path
    assert path is not None
    assert [link["operstate"] for link in networks.show("link", "show", "lo", netns=path)] == ["UNKNOWN"]
    rules = networks.run("iptables", "-t", "nat", "-S")
    assert "--dport 8080 -j DNAT --to-destination 10.77.1.2:80" in rules
    [veth] = (link for link in networks.links() if link.startswith("veth"))
    [limit] = (q for q in networks.show("qdisc", "show", "dev", veth, program="tc") if q["kind"] == "tbf")
    assert limit["options"]["rate"] == 1_000_000  # bytes per second
    opened = await driver.open_taps(made)
    taps.close(opened)
    assert len(opened) == 1
    await driver.recover(made, timeout_s=LIMIT_S)
    held = {(h.kind, h.vm_id) for h in await driver.held(host.mark)}
    assert held == {("cni", made.vm_id)}
    await detach(driver, made)
    assert host.left() == NOTHING
    await detach(driver, made)
    assert await driver.held(host.mark) == []
    with pytest.raises(NetworkError, match="is gone"):
        await driver.recover(made, timeout_s=LIMIT_S)


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0"])
async def test_older_versions_are_spoken_with_the_real_plugins(version: str, host: Host) -> None:
    """Their results differ in form, and 0.3.1 has neither CHECK nor a result to delete by."""
    host.network("10-first", PORTMAP, cniVersion=version)
    driver = host.driver()
    made = await attach(driver, host.plan(driver, ports=(PortMapping(host=8080, container=80),)))
    assert made.endpoints[0].addresses == ("10.77.1.2/24", "fd77:1::2/64")
    (kept,) = (json.loads(path.read_text()) for path in host.directory.glob("state/cni/*"))
    assert (kept["version"], kept["result"]["cniVersion"]) == (version, version)
    await detach(host.driver(), made)
    assert host.left() == NOTHING


async def test_the_plugin_bandwidth_bounds_real_traffic(host: Host) -> None:
    host.network("10-first", BANDWIDTH)
    driver = host.driver()
    made = await attach(driver, host.plan(driver, rate_mbit=RateMbit(ingress=20, egress=10)))
    (tap,) = await driver.open_taps(made)

    def measure(guest: Peer) -> tuple[float, float]:
        inner, outer = connection(guest.socket(), socket.create_server(("10.77.1.1", 0)))
        with inner, outer:
            return transfer(outer, inner, 1_500_000), transfer(inner, outer, 1_500_000)

    try:
        with peer(f"guest-{host.mark}", made, tap) as guest:
            received, sent = await asyncio.to_thread(measure, guest)
    finally:
        taps.close([tap])
    # With the bursts, which pass at once.
    assert 20 * 0.66 < received < 20 * 1.2
    assert 10 * 0.66 < sent < 10 * 1.2
    await detach(driver, made)
    assert host.left() == NOTHING


async def test_several_networks_come_in_the_pods_order(host: Host) -> None:
    host.network("20-second", PORTMAP, name="second", subnet=2)
    driver = host.driver()
    planned = host.plan(
        driver, networks=("second", "first"), ports=(PortMapping(host=53, container=53, protocol="udp"),)
    )
    made = await attach(driver, planned)
    assert [(e.name, e.network, e.addresses[0]) for e in made.endpoints] == [
        ("eth0", "second", "10.77.2.2/24"),
        ("eth1", "first", "10.77.1.2/24"),
    ]
    assert len({e.mac for e in made.endpoints}) == 2
    assert len(host.kept()) == 2
    await detach(driver, made)
    assert host.left() == NOTHING


async def test_own_name_servers_come_before_those_of_the_network(host: Host) -> None:
    driver = host.driver()
    made = await attach(driver, host.plan(driver, dns=DnsConfig(servers=("192.0.2.1",))))
    assert made.dns == DnsConfig(servers=("192.0.2.1",))
    await detach(driver, made)


async def test_delete_works_after_a_restart_without_the_configuration(host: Host) -> None:
    host.network("10-first", PORTMAP)
    driver = host.driver()
    made = await attach(driver, host.plan(driver, ports=(PortMapping(host=8080, container=80),)))
    (host.conf_dir / "10-first.conflist").unlink()
    await detach(host.driver(), NetworkAttachment(model=made.model, vm_id=made.vm_id))
    assert host.left() == NOTHING


async def test_delete_works_after_the_namespace_is_gone(host: Host) -> None:
    driver = host.driver()
    made = await attach(driver, host.plan(driver))
    namespaces.remove(made.vm_id)
    for held in await driver.held(host.mark):
        await driver.free(held, timeout_s=LIMIT_S)
    networks.gone("veth")
    assert {**host.left(), "rules": []} == NOTHING  # this version of the plugin looks for its rule in there


@pytest.mark.parametrize("mode", list(Interworking))
async def test_plugins_say_after_a_restart_whether_all_stands(mode: Interworking, host: Host) -> None:
    made = await attach(host.driver(), host.plan(host.driver(), interworking=mode))
    again = host.driver()
    await again.recover(made, timeout_s=LIMIT_S)
    networks.run("ip", "route", "del", "default", netns=made.netns_path)
    if mode is not Interworking.BRIDGED:
        with pytest.raises(NetworkError, match="CHECK of CNI network first: plugin bridge failed"):
            await again.recover(made, timeout_s=LIMIT_S)
    await detach(again, made)
    assert host.left() == NOTHING


async def test_network_of_a_spare_is_used(host: Host) -> None:
    driver = host.driver()
    planned = host.plan(driver)

    def spare() -> None:
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        taps.make("tap0")

    namespaces.call(None, lambda: namespaces.create(planned.vm_id, spare))
    made = await attach(driver, planned)
    assert len(made.endpoints[0].addresses) == 2
    assert networks.links(made.netns_path) == {"eth0", "tap0"}
    await detach(driver, made)
    assert host.left() == NOTHING


# -- what goes wrong --------------------------------------------------------------------------------


async def test_what_cannot_be_is_refused_before_anything_is_made(host: Host) -> None:
    driver = host.driver()
    with pytest.raises(InvalidArgumentError, match="netns_path"):
        driver.check(NetworkConfig(netns_path="/run/netns/x"))
    with pytest.raises(UnsupportedError):
        await driver.prepare("vm-1", 1, timeout_s=LIMIT_S)
    for config, message in (
        ({"networks": ("none",)}, "no CNI network none; configured: first"),
        (
            {"ports": (PortMapping(host=1, container=1),)},
            "ports: CNI network first has no plugin .* portMappings",
        ),
        ({"rate_mbit": RateMbit(egress=1)}, "rate_mbit: CNI network first has no plugin .* bandwidth"),
    ):
        planned = host.plan(driver, **config)
        with pytest.raises((NetworkError, FailedPreconditionError), match=message):
            await attach(driver, planned)
        assert host.left() == NOTHING
        await detach(driver, planned)


async def test_port_of_another_pod_is_refused(host: Host) -> None:
    driver = host.driver()
    taken = host.plan(driver, ports=(PortMapping(host=8080, container=80),))
    config = NetworkConfig(ports=(PortMapping(host=8080, container=81),))
    with pytest.raises(FailedPreconditionError, match="8080 is pod web's"):
        driver.plan(NetworkRequest(pod_id="b", vm_id="vm-2", config=config), [taken])


BROKEN = {
    "fails": (failure(11, "no room"), "failed: no room"),
    "hangs": ("sleep 1000", "has not ended within 3 s"),
    "nonsense": ("echo hello", "no result: not JSON"),
    "dies": ("kill -9 $$", "signal 9"),
    "lies": (
        """echo '{"cniVersion":"1.0.0"}'; ip netns exec $(basename $CNI_NETNS) ip link del eth0""",
        "not made eth0",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
async def test_failed_add_is_undone_by_detach(how: str, host: Host) -> None:
    script, message = BROKEN[how]
    host.plugins.write("broken", add=script)
    host.network("10-first", PORTMAP, {"type": "broken"})
    host.network("05-before", name="before", subnet=3)
    driver = host.driver(timeout_s=3.0) if how == "hangs" else host.driver()
    planned = host.plan(driver, networks=("before", "first"))
    with pytest.raises(NetworkError, match=message):
        await attach(driver, planned)
    assert len(host.kept()) == 2
    await detach(host.driver(), planned)
    assert "DEL broken" in host.plugins.names()
    assert {**host.left(), "rules": []} == NOTHING
    await detach(driver, planned)


async def test_cancelled_add_is_undone_by_detach(host: Host) -> None:
    os.mkfifo(host.directory / "up")
    host.plugins.write("slow", add=f"echo up >{host.directory}/up; sleep 1000")
    host.network("10-first", {"type": "slow"})
    driver = host.driver()
    planned = host.plan(driver)
    call = asyncio.create_task(attach(driver, planned))
    await asyncio.to_thread((host.directory / "up").read_text)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await detach(driver, planned)
    assert host.left() == NOTHING


async def test_failed_delete_keeps_what_it_needs_and_can_be_repeated(host: Host) -> None:
    host.plugins.write("stuck", delete=failure(5, "disk full"))
    host.network("10-first", {"type": "stuck"})
    host.network("20-second", name="second", subnet=2)
    driver = host.driver()
    made = await attach(driver, host.plan(driver, networks=("first", "second")))
    for _ in range(2):
        with pytest.raises(NetworkError, match="DEL of CNI network first: plugin stuck failed: disk full"):
            await detach(driver, made)
    assert host.kept() == [f"{made.vm_id}.eth0.json"]  # that of the other network is done
    assert host.left()["namespaces"] == [made.vm_id]
    host.plugins.write("stuck")
    await detach(driver, made)
    assert host.left() == NOTHING


async def test_broken_configurations_are_noted_and_hide_no_other(host: Host) -> None:
    (host.conf_dir / "00-bad.conf").write_text("{}")
    driver = host.driver()
    await driver.open()
    assert [note.rpartition(": ")[2] for note in driver.info.notes] == [
        "'name' must be letters, digits, '_', '.' and '-'."
    ]
    made = await attach(driver, host.plan(driver))
    await detach(driver, made)


async def test_host_without_cni_has_nothing_to_note(host: Host, tmp_path: Path) -> None:
    driver = CniNetwork(CniSettings(conf_dir=tmp_path / "none"), tmp_path / "state")
    await driver.open()
    assert driver.info.notes == ()
    with pytest.raises(NetworkError, match="no CNI network a default; configured: none"):
        await attach(driver, host.plan(driver))


async def test_plugins_that_make_too_much_are_told(host: Host) -> None:
    more = "; ".join(
        f"ip -n $name link add x{n} type veth peer y{n}; ip -n $name addr add 10.78.{n}.1/24 dev x{n}"
        for n in range(8)
    )
    host.plugins.write("much", add=f"name=$(basename $CNI_NETNS); {more}; echo '{json.dumps(RESULT)}'")
    host.network("10-first", {"type": "much"})
    driver = host.driver()
    planned = host.plan(driver)
    with pytest.raises(NetworkError, match=r"plugins of VM .* have made has more than 8 interfaces"):
        await attach(driver, planned)
    await detach(driver, planned)
    assert {**host.left(), "links": []} == NOTHING


async def test_what_is_kept_but_cannot_be_read_stops_no_start_and_nothing_is_collected(host: Host) -> None:
    host.plugins.write("new")
    conf = {"cniVersion": "1.1.0", "name": "new", "plugins": [{"type": "new"}]}
    (host.conf_dir / "10-first.conflist").write_text(json.dumps(conf))
    (host.directory / "state" / "cni").mkdir(parents=True)
    (host.directory / "state" / "cni" / "vm-1.eth0.json").write_text("{")
    (host.directory / "state" / "cni" / "vm-2.eth0.new").write_text("{")  # a crash in the middle of a write
    driver = host.driver(gc=True)
    await driver.open()
    assert host.plugins.names() == []
    assert "vm-1.eth0.json is damaged" in driver.info.notes[0]
    assert host.kept() == ["vm-1.eth0.json"]


async def test_garbage_is_collected_only_where_that_is_wanted(host: Host) -> None:
    host.plugins.write("new")
    conf = {"cniVersion": "1.1.0", "name": "new", "plugins": [{"type": "new"}]}
    (host.conf_dir / "10-first.conflist").write_text(json.dumps(conf))
    await host.driver().open()
    assert host.plugins.names() == []
    await host.driver(gc=True).open()
    assert host.plugins.names() == ["GC new"]
