"""A whole node with pods whose guests run hyperstart: every command that the protocol allows, over NATS."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.hyperstart import DESTROYPOD, NEWCONTAINER, STARTPOD
from tests.support.hypervms import HyperstartVms
from tests.support.nats import NatsServer
from vcnode import node as composition
from vcnode.aio import Tasks
from vcnode.client import Client, NodeClient
from vcnode.drivers.agent.hyperstart import HyperstartAgent
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.network.mock import MockNetwork
from vcnode.drivers.storage.mock import MockStorage, MockWorld
from vcnode.errors import PermissionDeniedError, UnsupportedError, VcnodeError
from vcnode.models.network import NetworkModel
from vcnode.models.pod import (
    AgentConfig,
    AgentType,
    Cmd,
    ContainerSpec,
    HyperConfig,
    HypervisorConfig,
    HypervisorType,
    OnDisconnect,
    PodSpec,
)
from vcnode.models.sessions import TerminalSize
from vcnode.node import Drivers, running
from vcnode.settings import NatsSettings, PolicySettings, Settings

pytestmark = [pytest.mark.nats, pytest.mark.timeout(60)]
WAIT_S = 20.0


class Host:
    """What outlives a node agent."""

    def __init__(self, directory: Path, url: str, vms: HyperstartVms) -> None:
        self.vms = vms
        self.settings = Settings(
            node_name="n1",
            state_dir=directory / "s",
            run_dir=directory / "r",
            allowed_roots=(Path("/roots"),),
            metrics_address="",
            network=NetworkModel.BRIDGE,
            nats=NatsSettings(url=url),
        )
        self.storage = MockWorld()
        self.networks: dict = {}

    def drivers(self, settings: Settings, tasks: object, **_: object) -> Drivers:
        """In the place of `vcnode.node.choose_drivers`."""
        return Drivers(
            hypervisors={HypervisorType.QEMU: self.vms},
            agents={AgentType.HYPERSTART: HyperstartAgent()},
            networks={NetworkModel.BRIDGE: MockNetwork(FaultPlan(), made=self.networks)},
            storage=MockStorage(settings.host_paths, run_dir=settings.run_dir, world=self.storage),
        )

    @asynccontextmanager
    async def node(self, **changes: object) -> AsyncIterator[NodeClient]:
        """A node agent on it, as a client sees it."""
        async with running(self.settings.model_copy(update=changes)) as node:
            await node.connection.wait_connected()
            async with await Client.connect(self.settings.nats.url) as client:
                yield client.node("n1")


@pytest.fixture(params=[4242, 4244, "fork"], ids=str)
async def host(
    request: pytest.FixtureRequest,
    nats_server: NatsServer,
    short_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Host]:
    fork = request.param == "fork"
    async with Tasks() as tasks:
        vms = HyperstartVms(tasks, 4244 if fork else request.param, fork=fork)
        made = Host(short_dir, nats_server.url, vms)
        monkeypatch.setattr(composition, "choose_drivers", made.drivers)
        yield made
        for machine in vms.world.alive:
            vms.world.die(machine.spec.vm_id)
        async with asyncio.timeout(WAIT_S):
            await vms.stopped()


def pod(host: Host, *containers: ContainerSpec, **fields: object) -> PodSpec:
    dialect = "clearcontainers" if host.vms._fork else "hyperhq"
    return PodSpec(
        id="p",
        agent_type=AgentType.HYPERSTART,
        agent_config=AgentConfig(hyperstart=HyperConfig(dialect=dialect)),
        hypervisor_config=HypervisorConfig(
            kernel_path="/roots/kernel", initrd_path="/roots/hyper-initrd.img"
        ),
        containers=containers,
        **fields,  # type: ignore[arg-type]
    )


def container(container_id: str, *args: str, **fields: object) -> ContainerSpec:
    return ContainerSpec(id=container_id, rootfs="/roots/a", cmd=Cmd(args=args), **fields)  # type: ignore[arg-type]


async def test_the_life_of_a_pod(host: Host) -> None:
    sleeper = container("main", "sleep", "1000", stop_timeout_s=0.0)
    async with host.node() as node:
        status = await node.pod_run(pod(host, sleeper))
        assert (status.state, status.agent_type) == ("running", "hyperstart")
        (guest,) = host.vms.guests
        (told,) = guest.sent(STARTPOD)
        assert told["interfaces"][0]["ipAddress"].startswith("10.119.")
        assert told["routes"][-1]["dest"] == "default"
        assert guest.sent(NEWCONTAINER)[0]["image"] == "main"

        result = await node.container_exec(
            "p", "main", ["sh", "-c", "cat; echo err >&2; exit 5"], stdin=b"hello"
        )
        assert (result.exit_code, result.stdout.raw, result.stderr.raw) == (5, b"hello", b"err\n")
        async with node.exec_stream("p", "main", ["cat"]) as process:
            await process.stdin.write(b"x" * 3000)
            await process.stdin.close()
            got = [chunk async for _, chunk in process.output()]
            assert (b"".join(got), await process.wait()) == (b"x" * 3000, 0)
        if not host.vms._fork:
            size = TerminalSize(rows=30, columns=100)
            async with node.exec_stream("p", "main", ["stty", "size"], tty=size) as process:
                await process.wait()

        echo = container("echo", "sh", "-c", "read l; echo got $l; exit 3", stdin=True)
        await node.container_create("p", echo)
        await node.container_start("p", "echo")
        async with node.attach("p", "echo") as process:
            await process.stdin.write(b"you\n")
            assert b"".join([chunk async for _, chunk in process.output()]) == b"got you\n"
        ended = await node.container_wait("p", "echo", timeout_s=WAIT_S)
        assert ended.container.exit_code == 3
        pieces = [entry async for reply in node.follow_logs("p", "echo") for entry in reply.entries]
        assert "".join(piece.data for piece in pieces) == "got you\n"
        await node.container_start("p", "echo")
        await node.container_kill("p", "echo", signal=9)
        await node.container_delete("p", "echo", force=True)

        (Path(guest.directory) / "files" / "main").mkdir(parents=True)
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as archive:
            entry = tarfile.TarInfo("f")
            entry.size = 5
            archive.addfile(entry, io.BytesIO(b"hello"))
        async with node.copy_in("p", "main", "/") as copy:
            await copy.write(raw.getvalue())
            await copy.finish()
        async with node.copy_out("p", "main", "/f") as out:
            assert b"hello" in b"".join([piece async for piece in out.pieces()])

        await node.pod_pause("p")
        await node.pod_resume("p")
        for refused in (
            node.container_pause("p", "main"),
            node.container_processes("p", "main"),
            node.container_exec("p", "main", Cmd(args=("x",), capabilities=("CAP_KILL",)))
            if not host.vms._fork
            else node.pod_exec("p", ["true"]),
        ):
            with pytest.raises(UnsupportedError):
                await refused

        stopped = await node.pod_stop("p")
        assert stopped.outcome in ("graceful", "absent")  # the guest may be off before it is waited for
        assert guest.sent(DESTROYPOD) == [b""]
        assert (await node.pod_start("p")).state == "running"
        await node.pod_delete("p", force=True)
        assert host.storage.empty


async def test_pods_outlive_their_node_agent(host: Host) -> None:
    reader = container("main", "sh", "-c", "read l; echo got $l; exit 4", stdin=True)
    async with host.node() as node:
        await node.pod_run(pod(host, reader, container("done", "sh", "-c", "exit 6")))
        await node.container_wait("p", "done", timeout_s=WAIT_S)
    async with host.node() as node:
        status = await node.pod_status("p")
        assert [(c.state, c.exit_code) for c in status.containers] == [("running", None), ("stopped", 6)]
        assert len(host.vms.guests) == 1
        await node.container_start("p", "done")  # made anew: the guest keeps nothing of it
        await node.container_wait("p", "done", timeout_s=WAIT_S)
        async with node.attach("p", "main") as process:
            await process.stdin.write(b"you\n")
            assert b"".join([chunk async for _, chunk in process.output()]) == b"got you\n"
        ended = await node.container_wait("p", "main", timeout_s=WAIT_S)
        assert ended.container.exit_code == 4
        await node.pod_delete("p", force=True)


async def test_a_guest_that_goes_mad_costs_its_pod_only(host: Host) -> None:
    async with host.node() as node:
        await node.pod_run(pod(host, container("main", "sleep", "1000")))
        (guest,) = host.vms.guests
        guest.tell_raw(b"\xff" * 64)
        async with asyncio.timeout(WAIT_S):
            while guest.commands[-1][0] != 17 and len(guest.commands) < 7:  # noqa: ASYNC110 -- it is heard, not told
                await asyncio.sleep(0.01)
        result = None
        async with asyncio.timeout(WAIT_S):
            while result is None:
                try:
                    result = await node.container_exec("p", "main", ["echo", "fine"])
                except VcnodeError:
                    await asyncio.sleep(0.05)
        assert result.stdout.raw == b"fine\n"
        await node.pod_delete("p", force=True)


@pytest.mark.parametrize("host", [4244], indirect=True)
async def test_what_cannot_be_is_refused_before_anything_is_kept(host: Host) -> None:
    async with host.node() as node:
        plain = pod(host, container("main", "true"))
        refused = {
            "pod.hypervisor_config": plain.model_copy(update={"hypervisor_config": HypervisorConfig()}),
            "pod.containers[0].resources": pod(host, container("main", "true", resources={"pids_limit": 4})),
            "pod.containers[0].readonly_rootfs": pod(host, container("main", "true", readonly_rootfs=True)),
            "pod.containers[0].cmd.no_new_privileges": pod(
                host,
                ContainerSpec(id="main", rootfs="/roots/a", cmd=Cmd(args=("x",), no_new_privileges=True)),
            ),
            "pod.on_disconnect.action": pod(host, on_disconnect=OnDisconnect(action="stop", after_s=60)),
        }
        for field, spec in refused.items():
            with pytest.raises(VcnodeError) as caught:
                await node.pod_create(spec)
            assert caught.value.message.startswith(f"{field}: ")
        assert (await node.pod_list()).pods == ()
    async with host.node(policy=PolicySettings(capabilities=("CAP_KILL",))) as node:
        with pytest.raises(PermissionDeniedError):
            await node.pod_create(
                pod(host, ContainerSpec(id="main", rootfs="/roots/a", cmd=Cmd(args=("x",))))
            )
