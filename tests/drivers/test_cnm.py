"""The cnm driver on namespaces that somebody else has made: taken, and put back as they were."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import networks
from vcnode.drivers import namespaces
from vcnode.drivers.network import interworking, taps
from vcnode.drivers.network.cnm import CnmNetwork
from vcnode.errors import FailedPreconditionError, InvalidArgumentError, NetworkError, UnsupportedError
from vcnode.models.network import Interworking, NetworkConfig, PortMapping, RateMbit, Route
from vcnode.models.vm import NetworkAttachment, NetworkRequest
from vcnode.settings import CnmSettings

pytestmark = pytest.mark.root

LIMIT_S = 30.0


class Place:
    """A namespace with two interfaces that lead somewhere, and the state directory of a node."""

    def __init__(self, path: str, directory: Path) -> None:
        self.path = path
        self.directory = directory
        self.name = Path(path).name

    def ip(self, *words: str) -> str:
        return networks.run("ip", *words, netns=self.path)

    def set_up(self) -> None:
        """As a CNM plugin would: two veths with all kinds of addresses and routes, and one without any."""
        self.ip("link", "set", "lo", "up")
        for name, mac in (
            ("eth0", "02:aa:00:00:00:01"),
            ("net1", "02:aa:00:00:00:02"),
            ("bare", "02:aa:00:00:00:03"),
        ):
            self.ip("link", "add", name, "address", mac, "type", "veth", "peer", f"p-{name}")
            self.ip("link", "set", f"p-{name}", "up")
            self.ip("link", "set", name, "up")
        self.ip("link", "set", "eth0", "mtu", "1400", "alias", "somebody's own")
        self.ip("link", "set", "net1", "mtu", "9000")
        self.ip("link", "add", "off", "type", "veth", "peer", "p-off")
        self.ip("addr", "add", "10.88.9.2/24", "dev", "off")
        self.ip("rule", "add", "from", "10.88.0.2", "lookup", "100")
        self.ip("addr", "add", "10.88.0.2/24", "dev", "eth0")
        self.ip("route", "add", "10.99.0.0/16", "dev", "eth0", "table", "100")
        self.ip("addr", "add", "10.88.7.2/24", "dev", "eth0")
        self.ip("addr", "add", "fd88::2/64", "dev", "eth0", "nodad")
        self.ip("addr", "add", "10.89.0.2/32", "dev", "net1")
        self.ip("route", "add", "10.89.0.1", "dev", "net1")
        self.ip("route", "add", "10.90.0.0/16", "via", "10.89.0.1", "dev", "net1", "metric", "7")
        self.ip("route", "add", "default", "via", "10.88.0.1")
        self.ip("-6", "route", "add", "default", "via", "fd88::1")
        networks.settle(self.path, "eth0", "net1", "bare")

    def driver(self) -> CnmNetwork:
        return CnmNetwork(CnmSettings(), self.directory / "state")

    def plan(self, driver: CnmNetwork, **config: Any) -> NetworkAttachment:
        vm_id = f"vm-{secrets.token_hex(6)}"
        found = NetworkConfig(**{"netns_path": self.path, **config})
        return driver.plan(NetworkRequest(pod_id="web", vm_id=vm_id, config=found), ())

    def kept(self) -> list[str]:
        return [path.name for path in self.directory.glob("state/cnm/*")]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with networks.own_network(), networks.named(f"cnm-{secrets.token_hex(4)}") as path:
        made = Place(path, tmp_path)
        namespaces.call(path, lambda: Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0"))
        made.set_up()
        yield made


async def attach(driver: CnmNetwork, planned: NetworkAttachment) -> NetworkAttachment:
    return await driver.attach(planned, timeout_s=LIMIT_S)


@pytest.mark.parametrize("mode", list(Interworking))
async def test_interfaces_are_taken_and_put_back(mode: Interworking, place: Place) -> None:
    driver = place.driver()
    await driver.open()
    before = networks.picture(place.path)
    made = await attach(driver, place.plan(driver, interworking=mode))
    first, second = made.endpoints
    assert (first.name, first.mac, first.mtu) == ("eth0", "02:aa:00:00:00:01", 1400)
    assert first.addresses == ("10.88.0.2/24", "10.88.7.2/24", "fd88::2/64")
    assert first.routes == (
        Route(destination="0.0.0.0/0", gateway="10.88.0.1"),
        Route(destination="::/0", gateway="fd88::1"),
    )
    assert (second.name, second.mac, second.addresses) == ("net1", "02:aa:00:00:00:02", ("10.89.0.2/32",))
    assert second.mtu == 9000
    assert second.routes == (
        Route(destination="10.89.0.1/32"),
        Route(destination="10.90.0.0/16", gateway="10.89.0.1", metric=7),
    )
    assert made.namespace is not None
    assert not made.namespace.created
    opened = await driver.open_taps(made)
    taps.close(opened)
    assert len(opened) == 2
    await driver.recover(made, timeout_s=LIMIT_S)
    assert networks.picture(place.path) != before
    await driver.detach(made, timeout_s=LIMIT_S)
    assert networks.picture(place.path) == before
    assert place.kept() == []
    await driver.detach(made, timeout_s=LIMIT_S)
    with pytest.raises(NetworkError, match="is gone"):
        await driver.recover(made, timeout_s=LIMIT_S)


@pytest.mark.parametrize("mode", list(Interworking))
@pytest.mark.parametrize("at", range(1, 4))
async def test_half_taken_namespace_is_put_back_by_the_next_agent(
    at: int, mode: Interworking, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node agent ends in the middle: before an interface is wired, and between its steps."""
    driver = place.driver()
    planned = place.plan(driver, interworking=mode)
    before = networks.picture(place.path)
    steps = iter(range(1, 100))

    def dying(step: Any) -> Any:
        async def act(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == at:
                raise KeyboardInterrupt
            return await step(*args, **kwargs)

        return act

    for name in ("wire", "make_tap", "redirect", "_bridge"):
        monkeypatch.setattr(interworking, name, dying(getattr(interworking, name)))
    monkeypatch.setattr(interworking.macvtaps, "make", dying(interworking.macvtaps.make))
    with pytest.raises(KeyboardInterrupt):
        await attach(driver, planned)
    monkeypatch.undo()
    again = place.driver()
    [held] = await again.held("vm-")
    assert held.vm_id == planned.vm_id
    await again.free(held, timeout_s=LIMIT_S)
    assert networks.picture(place.path) == before
    assert place.kept() == []


async def test_namespace_of_another_vm_is_refused_and_left_alone(place: Place) -> None:
    driver = place.driver()
    made = await attach(driver, place.plan(driver))
    networks.quiet_taps(place.path)
    wired = networks.picture(place.path)
    other = place.plan(driver)
    with pytest.raises(FailedPreconditionError, match=f"is that of VM {made.vm_id} already"):
        await attach(driver, other)
    of_other_node = CnmNetwork(CnmSettings(), place.directory / "other")
    with pytest.raises(FailedPreconditionError, match="is a VM's already: eth0 is wired"):
        await attach(of_other_node, other)
    for each in (driver, of_other_node):
        await each.detach(other, timeout_s=LIMIT_S)
    assert networks.picture(place.path) == wired
    with pytest.raises(FailedPreconditionError, match="is pod web's"):
        driver.plan(NetworkRequest(pod_id="b", vm_id="vm-b", config=made.config), [made])
    await driver.detach(made, timeout_s=LIMIT_S)


async def test_names_that_are_taken_are_refused_and_left_alone(place: Place) -> None:
    place.ip("tuntap", "add", "tap1", "mode", "tap")
    before = networks.picture(place.path)
    driver = place.driver()
    planned = place.plan(driver)
    with pytest.raises(FailedPreconditionError, match="has an interface tap1, a name that is needed"):
        await attach(driver, planned)
    await driver.detach(planned, timeout_s=LIMIT_S)
    assert networks.picture(place.path) == before


async def test_namespace_that_was_made_anew_is_left_alone(place: Place) -> None:
    driver = place.driver()
    made = await attach(driver, place.plan(driver))
    networks.run("ip", "netns", "del", place.name)
    networks.run("ip", "netns", "add", place.name)
    place.ip("tuntap", "add", "tap0", "mode", "tap")
    with pytest.raises(NetworkError, match=r"is gone|has lost"):
        await driver.recover(made, timeout_s=LIMIT_S)
    await driver.detach(made, timeout_s=LIMIT_S)
    assert networks.links(place.path) == {"tap0"}
    assert place.kept() == []


async def test_interfaces_on_top_of_each_other_are_refused_together(place: Place) -> None:
    """What comes in by the lower one goes to the VM, so the upper one would hear nothing."""
    place.ip("link", "add", "top0", "link", "net1", "type", "macvlan")
    place.ip("link", "set", "top0", "up")
    place.ip("addr", "add", "10.91.0.2/24", "dev", "top0")
    networks.settle(place.path, "top0")
    driver = place.driver()
    before = networks.picture(place.path)
    with pytest.raises(FailedPreconditionError, match="has top0 on top of net1, which cannot both"):
        await attach(driver, place.plan(driver))
    assert networks.picture(place.path) == before
    place.ip("addr", "flush", "dev", "net1")
    made = await attach(driver, place.plan(driver))
    assert [e.name for e in made.endpoints] == ["eth0", "top0"]
    await driver.detach(made, timeout_s=LIMIT_S)


async def test_foreign_filters_are_refused_and_stay(place: Place) -> None:
    networks.run("tc", "qdisc", "add", "dev", "net1", "clsact", netns=place.path)
    before = networks.picture(place.path)
    driver = place.driver()
    planned = place.plan(driver)
    with pytest.raises(NetworkError, match="net1 has ingress filters of somebody else"):
        await attach(driver, planned)
    await driver.detach(planned, timeout_s=LIMIT_S)
    assert networks.picture(place.path) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"netns_path": None}, "must be given"),
        ({"netns_path": "/proc/1/ns/net"}, "must lie below /run/netns"),
        ({"netns_path": "/run/netns/../../proc/1/ns/net"}, "must lie below"),
        ({"netns_path": "/run/netns"}, "must lie below"),
        ({"netns_path": "/run/netns/vm-0123456789ab"}, "is the namespace of another pod"),
        ({"networks": ("a",)}, "networks: does not go with"),
        ({"ports": (PortMapping(host=1, container=1),)}, "ports: does not go with"),
        ({"rate_mbit": RateMbit(egress=1)}, "rate_mbit: does not go with"),
    ],
)
async def test_what_does_not_go_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    driver = CnmNetwork(CnmSettings(), tmp_path)
    with pytest.raises(InvalidArgumentError, match=message):
        driver.check(NetworkConfig(**{"netns_path": "/run/netns/x", **config}))
    with pytest.raises(UnsupportedError):
        await driver.prepare("vm-1", 1, timeout_s=LIMIT_S)


async def test_what_is_no_namespace_of_pods_is_refused(place: Place, tmp_path: Path) -> None:
    driver = CnmNetwork(CnmSettings(allowed_dirs=(tmp_path,)), tmp_path / "state")
    (tmp_path / "file").write_text("")
    (tmp_path / "out").symlink_to(place.path)
    (tmp_path / "own").touch()
    networks.run("mount", "--bind", "/proc/self/ns/net", str(tmp_path / "own"))
    for name, message in (
        ("none", "none cannot be used: No such file"),
        ("file", "is no network namespace"),
        ("out", "must lie below"),
        ("own", "is the node agent's own network"),
    ):
        planned = place.plan(driver, netns_path=str(tmp_path / name))
        with pytest.raises((InvalidArgumentError, FailedPreconditionError), match=message):
            await attach(driver, planned)
    networks.run("umount", str(tmp_path / "own"))
    assert not (tmp_path / "state").exists()


async def test_namespace_without_an_address_is_refused(place: Place) -> None:
    for name in ("eth0", "net1"):
        place.ip("addr", "flush", "dev", name)
    driver = place.driver()
    with pytest.raises(FailedPreconditionError, match="has no interface that is up and has an address"):
        await attach(driver, place.plan(driver))
    assert place.kept() == []
