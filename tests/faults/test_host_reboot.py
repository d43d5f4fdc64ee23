"""A host that was rebooted: the state directory is there, and nothing else that the node agent had made."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import networks
from tests.support.cni import Plugins
from tests.unit.pods.world import World, pod
from vcnode.drivers import namespaces
from vcnode.drivers.base import Network
from vcnode.drivers.network.bridge import BridgeNetwork, Nft
from vcnode.drivers.network.cni import CniNetwork
from vcnode.drivers.network.cnm import CnmNetwork
from vcnode.models.network import NetworkConfig, NetworkModel, PortMapping
from vcnode.models.pod import PodSpec, PodState
from vcnode.pods.marks import mark_of
from vcnode.pods.recovery import VM_ENDED
from vcnode.settings import BridgeSettings, CniSettings, CnmSettings, Settings

PASS_ON = """import json, sys; print(json.dumps(json.load(sys.stdin)["prevResult"]))"""
PORT = PortMapping(host=8080, container=80)


async def recovered(world: World, *pod_ids: str) -> None:
    """A new node agent finds these pods, whose VMs the reboot has ended."""
    await open_all(await world.start())
    found = await world.pods.recover()
    assert sorted(found.failed) == sorted(pod_ids)
    for pod_id in pod_ids:
        status = world.pods.status(pod_id)
        assert (status.state, status.reason, status.leftovers) == (PodState.FAILED, VM_ENDED, ())
        assert status.network is None  # the addresses are free again


async def test_pods_of_before_a_reboot_have_failed_and_their_places_are_free(tmp_path: Path) -> None:
    world = await World(tmp_path).start()
    for number in range(3):
        ports = (PORT,) if number == 0 else ()
        await world.pods.run(pod(f"p{number}", network=NetworkConfig(ports=ports)), world.call())
    await world.reboot()
    await recovered(world, "p0", "p1", "p2")
    assert (await world.pods.audit(repair=True)).orphan_count == 0
    await world.pods.run(pod("new", network=NetworkConfig(ports=(PORT,))), world.call())  # it is free
    await world.pods.start("p1", world.call("pod.start"))
    for pod_id in ("p0", "p1", "p2", "new"):
        assert (await world.pods.delete(pod_id, True, world.call("pod.delete"))).existed
    assert world.leaks == []
    await world.close()


class Site:
    """What a host's disks hold for CNI, and the networks of its node."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.plugins = Plugins(directory / "bin")
        self.plugins.write("witness", add=f"printf %s \"$conf\" | python3 -c '{PASS_ON}'")
        (directory / "net.d").mkdir()
        local = {"type": "host-local", "dataDir": str(directory / "leases"), "subnet": "10.77.1.0/24"}
        bridge = {"type": "bridge", "bridge": "cni1", "isGateway": True, "ipam": local}
        conf = {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, {"type": "witness"}]}
        (directory / "net.d" / "pods.conflist").write_text(json.dumps(conf))

    def networks(self, settings: Settings) -> Mapping[NetworkModel, Network]:
        bin_dirs = (self.plugins.directory, Path("/usr/lib/cni"))
        cni = CniSettings(conf_dir=self.directory / "net.d", bin_dirs=bin_dirs)
        return {
            NetworkModel.CNI: CniNetwork(cni, settings.state_dir),
            NetworkModel.CNM: CnmNetwork(CnmSettings(), settings.state_dir),
            NetworkModel.BRIDGE: BridgeNetwork(BridgeSettings(), mark_of(settings), Nft.find()),
        }

    def leases(self) -> list[str]:
        """Addresses that host-local holds, in files that a reboot leaves."""
        return sorted(path.name for path in self.directory.glob("leases/pods/10.*"))


def specs(given: str) -> tuple[PodSpec, ...]:
    return (
        pod("plain", network=NetworkConfig(ports=(PORT,))),
        pod("blue", network=NetworkConfig(networks=("blue",))),
        pod("plugged", network_model=NetworkModel.CNI),
        pod("given", network_model=NetworkModel.CNM, network=NetworkConfig(netns_path=given)),
    )


@pytest.mark.root
async def test_real_networks_are_gone_with_a_reboot_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Namespaces, interfaces, taps and nftables go; the plugins' leases and what DEL needs do not."""
    site = Site(tmp_path)
    world = World(tmp_path / "state", networks=site.networks)
    world.path.mkdir()
    mark = mark_of(world.settings)
    ids = ("plain", "blue", "plugged", "given")
    name = mark.replace("vm-", "given-")
    with networks.own_network(), networks.named(name) as given:
        make_interface(given)
        await open_all(await world.start())
        for spec in specs(given):
            await world.pods.run(spec, world.call())
        before = {pod_id: world.pods.status(pod_id).network for pod_id in ids}
        assert site.leases() == ["10.77.1.2"]
        assert len(namespaces.names(mark)) == 3
        await world.reboot()
        for left in namespaces.names(mark):
            namespaces.remove(left)  # /run is empty after a reboot
    monkeypatch.setattr("vcnode.drivers.network.cnm._boot_id", lambda: "the next boot")
    # The threads of before are still in the network of before.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=2))
    with networks.own_network(), networks.named(name) as given:
        make_interface(given)  # whoever made it has made it again
        picture = networks.picture(given)
        await recovered(world, *ids)
        assert site.leases() == []
        assert [call.env["CNI_NETNS"] for call in site.plugins.calls() if call.command == "DEL"] == [""]
        assert networks.picture(given) == picture
        assert not [path for kind in ("cni", "cnm") for path in (world.path / kind).glob("*")]
        report = await world.pods.audit(repair=True)
        assert (report.orphan_count, [h.name for h in report.holdings if h.vm_id]) == (0, [])
        for pod_id in ids:
            await world.pods.start(pod_id, world.call("pod.start"))
        after = {pod_id: world.pods.status(pod_id).network for pod_id in ids}
        assert all(network is not None for network in after.values())
        assert after["plugged"] != before["plugged"]  # in a namespace of its new VM
        assert {"vb-" + mark[3:], "cni1"} < networks.links()
        for pod_id in ids:
            await world.pods.delete(pod_id, True, world.call("pod.delete"))
        assert networks.picture(given) == picture
        assert namespaces.names(mark) == []
        assert site.leases() == []
        await world.close()
    assert world.leaks == []


async def open_all(world: World) -> None:
    """As the node agent opens its drivers at its start."""
    for network in world.networks.values():
        await network.open()


def make_interface(path: str) -> None:
    """As whoever gives a namespace would."""
    for words in (
        ("link", "add", "eth0", "address", "02:aa:00:00:00:01", "type", "veth", "peer", "far0"),
        ("addr", "add", "10.88.0.2/24", "dev", "eth0"),
        ("link", "set", "far0", "up"),
        ("link", "set", "eth0", "up"),
    ):
        networks.run("ip", *words, netns=path)
    networks.settle(path, "eth0", "far0")
