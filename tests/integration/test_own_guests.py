"""Pods whose guests are somebody else's: disks and kernels of their own, reached by SSH or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.integration.guest_here import make_busybox
from tests.support import machines
from tests.support.netns import private_network
from vcnode.drivers.agent.sshd import keys
from vcnode.errors import AgentError, UnsupportedError
from vcnode.models.call import Call
from vcnode.models.commands import ExecOptions
from vcnode.models.hypervisor import HypervisorConfig, MachineType, Param
from vcnode.models.network import NetworkModel
from vcnode.models.pod import AgentType, Cmd, ContainerSpec, EnvVar, PodSpec, PodState, Resources
from vcnode.node import Node, running
from vcnode.settings import NatsSettings, PolicySettings, QemuSettings, Settings

missing = [
    name for name in machines.TOOLS if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None
]
pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: run dev/setup --tests"),
]

LIMIT_S = 120.0
FIRST_UID = 1_900_000_000
_ids = itertools.count(1)


def call(verb: str) -> Call:
    return Call(f"{verb}-{next(_ids)}", verb)


@contextlib.asynccontextmanager
async def nothing_left(settings: Settings) -> AsyncIterator[None]:
    """Delete the pod, whatever has become of the test."""
    try:
        yield
    finally:
        async with running(settings) as node:
            await node.pods.delete("p1", True, call("pod.delete"))


@pytest.fixture
def settings(guest_image: Path, short_dir: Path) -> Iterator[Settings]:
    (short_dir / "roots").mkdir()
    (short_dir / "s").mkdir()
    with private_network():
        yield Settings(
            node_name="own",
            state_dir=short_dir / "s",
            run_dir=short_dir / "r",
            guest_dir=guest_image,
            allowed_roots=(short_dir / "roots",),
            metrics_address="",
            nats=NatsSettings(url="nats://127.0.0.1:1"),
            qemu=QemuSettings(accel="tcg", boot_timeout_s=LIMIT_S),
            network=NetworkModel.BRIDGE,
            policy=PolicySettings(kernel_params=("greeting=*",), hypervisor_params=("rtc=*",)),
        )


async def containers(node: Node, box: Path) -> None:
    """By the guest's own runtime, on a directory of the host."""
    make_busybox(box)
    (box / "etc").mkdir(exist_ok=True)
    (box / "etc/who").write_text("box")
    (box / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n")
    script = "trap 'exit 3' TERM; echo begun >/begun; while true; do sleep 0.1; done"
    main = ContainerSpec(id="main", rootfs=str(box), cmd=Cmd(args=("/bin/sh", "-c", script)))
    await node.pods.create_container("p1", main, call("container.create"))
    await node.pods.start_container("p1", "main", call("container.start"))
    assert await sh(node, 'id -u; echo "$A $PWD"', "main", user="web", workdir="/etc") == "1000\n /etc"
    image = main.model_copy(update={"id": "other", "rootfs": None, "image": "x"})
    with pytest.raises(UnsupportedError):
        await node.pods.create_container("p1", image, call("container.create"))
    once = main.model_copy(update={"id": "once", "cmd": Cmd(args=("/bin/sh", "-c", "exit 7"))})
    await node.pods.create_container("p1", once, call("container.create"))
    await node.pods.start_container("p1", "once", call("container.start"))
    done = await node.pods.wait_container("p1", "once", "exited")
    assert done.container is not None
    assert done.container.exit_code == 7
    await node.pods.delete_container("p1", "once", False, call("container.delete"))
    missing = once.model_copy(update={"cmd": Cmd(args=("/no/such/program",))})
    await node.pods.create_container("p1", missing, call("container.create"))
    with pytest.raises(AgentError, match="no/such/program"):
        await node.pods.start_container("p1", "once", call("container.start"))
    await node.pods.delete_container("p1", "once", False, call("container.delete"))
    assert (box / "begun").read_text() == "begun\n"


async def sh(node: Node, script: str, container: str | None = None, **cmd: object) -> str:
    options = ExecOptions(
        cmd=Cmd.model_validate({"args": ("sh", "-c", script), **cmd}, strict=False), timeout_s=60
    )
    result = await node.pods.exec("p1", container, options, call("pod.exec"))
    assert result.exit_code == 0, result
    return result.stdout.raw.decode().strip()


async def test_a_guest_with_an_ssh_server_on_a_disk_of_its_own(settings: Settings, guest_image: Path):
    """Direct kernel, own initramfs, a raw image below an overlay; exec over the pod's network."""
    roots = settings.allowed_roots[0]
    root = machines.root(roots, keys.own_key(settings.state_dir))
    disk = machines.ext4_disk(root, roots / "disk.raw")
    before = disk.read_bytes()
    initrd = roots / "initrd"
    initrd.write_bytes(machines.initramfs(guest_image))
    config = HypervisorConfig(
        initrd_path=str(initrd), image_path=str(disk), kernel_params=(Param(key="greeting", value="hello"),)
    )
    spec = PodSpec(
        id="p1", agent_type=AgentType.SSHD, hypervisor_config=config, resources=Resources(vcpu_count=2)
    )
    async with nothing_left(settings):
        async with running(settings) as node:
            status = await node.pods.run(spec, call("pod.run"))
            assert status.state is PodState.RUNNING
            assert "greeting=hello" in (await sh(node, "cat /proc/cmdline")).split()
            assert await sh(node, "nproc; hostname; cat /etc/boots") == "2\np1\n1"
            cmd = {"envs": (EnvVar(var="A", value="it's"),), "workdir": "/var/x", "user": "web"}
            assert await sh(node, 'echo "$A $PWD $(id -u)"', **cmd) == "it's /var/x 1000"
            await containers(node, settings.allowed_roots[0] / "box")
            await node.pods.pause("p1", call("pod.pause"))
            await node.pods.resume("p1", call("pod.resume"))
        async with running(settings) as node:  # the node agent comes back: the same guest, by the same key
            assert await sh(node, "cat /etc/boots") == "1"
            assert await sh(node, "hostname; cat /etc/who", "main") == "p1\nbox"  # it has gone on
            await node.pods.stop_container("p1", "main", 10, call("container.stop"))
            assert node.pods.container_status("p1", "main").exit_code == 3
            assert (await node.pods.stop("p1", 30, call("pod.stop"))).outcome == "graceful"
            await node.pods.start("p1", call("pod.start"))
            assert await sh(node, "cat /etc/boots") == "2"  # what was written is the pod's
            await node.pods.delete("p1", True, call("pod.delete"))
    assert disk.read_bytes() == before  # and never the image's
    assert list((settings.state_dir / "layers").iterdir()) == []


async def test_a_disk_image_that_starts_itself_without_any_agent(settings: Settings, guest_image: Path):
    """Firmware, partitions, a boot loader and a kernel in a qcow2 image; PCI; QEMU without rights."""
    settings = settings.model_copy(update={"qemu": settings.qemu.model_copy(update={"uid_base": FIRST_UID})})
    roots = settings.allowed_roots[0]
    root = machines.root(roots, keys.own_key(settings.state_dir))
    disk = machines.bootable_disk(
        guest_image, root, roots / "disk.qcow2", append="root=/dev/vda2 console=ttyS0 quiet panic=-1"
    )
    before = disk.read_bytes()
    spec = PodSpec(
        id="p1",
        agent_type=AgentType.NOOP,
        hypervisor_config=HypervisorConfig(image_path=str(disk), cpu_model="max", mem_prealloc=True),
    )
    async with nothing_left(settings):
        async with running(settings) as node:
            assert (await node.pods.run(spec, call("pod.run"))).state is PodState.RUNNING
            assert node.pods._parts.live["p1"].vm.record.uid is not None
            text = await until_console_says(node, "boot 1 of own")
            assert (
                "SYSLINUX" in text
            )  # the firmware has found the boot loader, which speaks on the serial port
            assert (await node.pods.pause("p1", call("pod.pause"))).state is PodState.PAUSED
        async with running(settings) as node:  # the node agent comes back
            assert node.pods.status("p1").state is PodState.PAUSED
            assert (await node.pods.resume("p1", call("pod.resume"))).state is PodState.RUNNING
            assert "boot 1 of own" in (await node.pods.console("p1", 4096, call("pod.console"))).text
            with pytest.raises(UnsupportedError, match="noop"):
                await sh(node, "true")
            assert (await node.pods.stop("p1", 5, call("pod.stop"))).outcome == "forced"
            assert node.pods.status("p1").state is PodState.STOPPED
            await node.pods.delete("p1", True, call("pod.delete"))
            assert disk.read_bytes() == before
            # Without the overlay, what one pod writes is there for the next.
            writable = spec.hypervisor_config.model_copy(update={"image_writable": True})
            spec = spec.model_copy(update={"hypervisor_config": writable})
            for number in (1, 2):
                await node.pods.run(spec, call("pod.run"))
                await until_console_says(node, f"boot {number} of own")
                await node.pods.delete("p1", True, call("pod.delete"))
    assert disk.read_bytes() != before


async def test_the_nodes_own_guest_on_another_machine(settings: Settings):
    """PCI, two vCPUs, switches of QEMU, a loud kernel; and containers as anywhere."""
    roots = settings.allowed_roots[0]
    make_busybox(roots / "box")
    config = HypervisorConfig(
        machine_type=MachineType.Q35,
        debug=True,
        kernel_params=(Param(key="greeting", value="hello"),),
        hypervisor_params=(Param(key="rtc", value="base=2001-02-03T04:05:06"),),
    )
    main = ContainerSpec(id="main", rootfs=str(roots / "box"), cmd=Cmd(args=("sleep", "1000")))
    spec = PodSpec(id="p1", hypervisor_config=config, resources=Resources(vcpu_count=2), containers=(main,))
    async with nothing_left(settings), running(settings) as node:
        status = await node.pods.run(spec, call("pod.run"))
        assert status.state is PodState.RUNNING
        assert "boot" in status.phases_ms
        words = (await sh(node, "cat /proc/cmdline", "main")).split()
        assert {"greeting=hello", "debug", "ignore_loglevel"} <= set(words)
        assert await sh(node, "nproc; cat /etc/hostname", "main") == "2\np1"
        text = (await node.pods.console("p1", 1 << 20, call("pod.console"))).text
        assert "2001-02-03T04:05" in text, text[-3000:]  # of the clock, which only a loud kernel mentions
        assert (await node.pods.stop("p1", 5, call("pod.stop"))).outcome == "graceful"


async def until_console_says(node: Node, text: str) -> str:
    """Wait for a line on the console; nothing announces it."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            found = (await node.pods.console("p1", 64 * 1024, call("pod.console"))).text
            if text in found:
                return found
            await asyncio.sleep(0.05)
