"""Pods on real plugins and in a given namespace: a spare and a clone, real packets, two node agents."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.guest_here import make_busybox
from tests.support import networks
from vcnode.models.call import Call
from vcnode.models.commands import ExecOptions
from vcnode.models.network import Interworking, NetworkConfig, NetworkModel, PortMapping
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec
from vcnode.node import Node, running
from vcnode.settings import CniSettings, NatsSettings, PoolSettings, QemuSettings, Settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

LIMIT_S = 120.0
_numbers = itertools.count(1)
LISTEN = "while :; do echo hello | nc -l -p 80 >/dev/null; done"


def call(verb: str = "test") -> Call:
    return Call(f"cmd-{next(_numbers)}", verb)


def settings_of(directory: Path, guest_image: Path) -> Settings:
    """Settings of a node with one CNI network, on Debian's plugins."""
    (directory / "net.d").mkdir()
    bridge = {
        "type": "bridge",
        "bridge": "cni1",
        "isGateway": True,
        "mtu": 1400,
        "ipam": {
            "type": "host-local",
            "dataDir": str(directory / "leases"),
            "ranges": [[{"subnet": "10.77.1.0/24"}], [{"subnet": "fd77:1::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    conf = {"cniVersion": "1.0.0", "name": "pods", "disableCheck": True, "plugins": [bridge, portmap]}
    (directory / "net.d" / "pods.conflist").write_text(json.dumps(conf))
    return Settings(
        node_name="cni",
        state_dir=directory / "s",
        run_dir=directory / "r",
        guest_dir=guest_image,
        allowed_roots=(directory,),
        metrics_address="",
        nats=NatsSettings(url="nats://127.0.0.1:1"),
        qemu=QemuSettings(accel="tcg", boot_timeout_s=LIMIT_S),
        network=NetworkModel.CNI,
        cni=CniSettings(conf_dir=directory / "net.d"),
    )


class Rig:
    """A host with two pods; the node agent over them can be restarted."""

    def __init__(self, settings: Settings, netns_path: str, box: Path) -> None:
        self.settings = settings
        self.netns_path = netns_path
        self.box = box
        self.node: Node

    @contextlib.asynccontextmanager
    async def agent(self, **changes: object) -> AsyncIterator[None]:
        """A node agent for a block; the pods stay."""
        async with running(self.settings.model_copy(update=changes)) as self.node:
            yield

    async def spare(self) -> None:
        """Wait until there is one."""
        async with asyncio.timeout(LIMIT_S):
            while not any(status.ready for status in self.node.pods.pool.statuses()):
                await self.node.pods.pool.changed.wait()
                self.node.pods.pool.changed.clear()

    async def run(self, pod_id: str, model: NetworkModel, network: NetworkConfig, *args: str) -> None:
        main = ContainerSpec(id="main", rootfs=str(self.box), cmd=Cmd(args=args))
        spec = PodSpec(
            id=pod_id, template="require", network_model=model, network=network, containers=(main,)
        )
        await self.node.pods.run(spec, call("pod.run"))

    async def shell(self, pod_id: str, script: str) -> str:
        """What a shell prints in the pod's container."""
        options = ExecOptions(cmd=Cmd(args=("/bin/sh", "-c", script)), timeout_s=60)
        result = await self.node.pods.exec(pod_id, "main", options, call())
        assert result.exit_code == 0, result
        return result.stdout.raw.decode().strip()

    async def pings(self) -> None:
        """Both pods reach the other end of their interfaces, by IPv4 and IPv6, with packets of full size."""
        for pod_id, addresses in (("web", ("10.77.1.1", "fd77:1::1")), ("given", ("10.88.0.1", "fd88::1"))):
            for address in addresses:
                await self.shell(pod_id, f"ping -c 1 -W 20 -s 1300 {address}")


async def test_pods_on_plugins_and_in_a_given_namespace(guest_image: Path, short_dir: Path) -> None:
    make_busybox(short_dir / "box")
    with networks.own_network(), networks.named(f"cnm-{secrets.token_hex(4)}") as path:
        networks.run("ip", "link", "add", "eth0", "netns", path, "type", "veth", "peer", "outer")
        for words, where in (
            (("addr", "add", "10.88.0.1/24", "dev", "outer"), None),
            (("addr", "add", "fd88::1/64", "dev", "outer", "nodad"), None),
            (("link", "set", "outer", "up"), None),
            (("addr", "add", "10.88.0.2/24", "dev", "eth0"), path),
            (("addr", "add", "fd88::2/64", "dev", "eth0", "nodad"), path),
            (("link", "set", "eth0", "up"), path),
            (("route", "add", "default", "via", "10.88.0.1"), path),
        ):
            networks.run("ip", *words, netns=where)
        networks.settle(path, "eth0")
        await lives(Rig(settings_of(short_dir, guest_image), path, short_dir / "box"))
        assert not list((short_dir / "leases").glob("*/10.*"))
        assert networks.links() == {"cni1", "outer"}


async def lives(rig: Rig) -> None:
    """Two pods from their start to their end, over two node agents."""
    before = networks.picture(rig.netns_path)
    try:
        async with rig.agent(pool=(PoolSettings(spares=1),)):
            await rig.spare()
            ports = (PortMapping(host=8080, container=80),)
            given = NetworkConfig(netns_path=rig.netns_path, interworking=Interworking.MACVTAP)
            await asyncio.gather(
                rig.run("web", NetworkModel.CNI, NetworkConfig(ports=ports), "/bin/sh", "-c", LISTEN),
                rig.run("given", NetworkModel.CNM, given, "sleep", "infinity"),
            )
            assert "pool" in rig.node.pods.status("web").phases_ms  # it has taken the spare over
            status = rig.node.pods.status("given")
            assert status.network is not None
            assert not status.network.created
            assert "10.88.0.2/24" in await rig.shell("given", "ip addr show eth0")
            await rig.pings()
        async with rig.agent():
            await rig.pings()
            reader, writer = await asyncio.open_connection("10.77.1.1", 8080)
            assert await reader.read() == b"hello\n"
            writer.close()
            await writer.wait_closed()
    finally:
        async with rig.agent():
            for pod_id in ("web", "given"):
                await rig.node.pods.delete(pod_id, True, call("pod.delete"))
    assert networks.picture(rig.netns_path) == before
