"""QEMU as a user of its own, with no right on the host, bounded, and with what it needs in its hands."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.integration.guest_here import make_busybox
from vcnode.drivers.hypervisor.qemu.cgroup import CONTROLLERS, Cgroups, Limits
from vcnode.errors import FailedPreconditionError
from vcnode.models.call import Call
from vcnode.models.commands import ExecOptions
from vcnode.models.network import NetworkModel
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec, PodStatus
from vcnode.node import Node, running
from vcnode.settings import NatsSettings, PoolSettings, QemuSettings, Settings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(240)]

BASE = 2_000_000_000
SLEEP = Cmd(args=("sleep", "1000"))


def call(verb: str) -> Call:
    return Call(f"{verb}-{time.monotonic_ns()}", verb)


async def said(node: Node, pod_id: str, container_id: str, script: str) -> str:
    options = ExecOptions(cmd=Cmd(args=("/bin/sh", "-c", script)), timeout_s=60)
    result = await node.pods.exec(pod_id, container_id, options, call("container.exec"))
    assert result.exit_code == 0, result
    return result.stdout.raw.decode()


def pid_of(status: PodStatus) -> int:
    assert status.hypervisor is not None
    assert status.hypervisor.pid is not None
    return status.hypervisor.pid


def facts(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def check_confined(pid: int) -> int:
    """What an unprivileged QEMU is; its user id."""
    found = facts(pid)
    (uid,) = set(found["Uid"])
    assert BASE <= int(uid) < BASE + 65_536
    assert set(found["Gid"]) == {uid}
    assert found["Groups"] == []
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(found[name][0], 16) == 0, name
    assert (found["Seccomp"], found["NoNewPrivs"]) == (["2"], ["1"])
    return int(uid)


def open_files(pid: int) -> set[str]:
    return {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}


def check_bounded(vm_id: str, pid: int) -> None:
    """The limits as the kernel has them, in v2 or, where that lacks a controller, in v1."""
    group = Cgroups.find().of(vm_id)
    assert group.path is not None
    assert str(pid) in (group.path / "cgroup.procs").read_text().split()
    limits = Limits.of(1, 256, 128)
    for controller in CONTROLLERS:
        path = group._v1.get(controller, group.path)
        files = limits.v1(controller, ()) if controller in group._v1 else limits.v2(())
        for name, text in files.items():
            if name.startswith(controller) or controller in group._v1:
                assert (path / name).read_text().strip() == text
        assert str(pid) in (path / "cgroup.procs").read_text().split()


async def test_a_vm_of_images_has_no_right_on_its_host(guest_image: Path, short_dir: Path) -> None:
    make_busybox(short_dir / "box")
    settings = Settings(
        node_name="confined",
        state_dir=short_dir / "s",
        run_dir=short_dir / "r",
        guest_dir=guest_image,
        allowed_roots=(short_dir,),
        metrics_address="",
        network=NetworkModel.NOOP,
        nats=NatsSettings(url="nats://127.0.0.1:1"),
        qemu=QemuSettings(accel="tcg", boot_timeout_s=180, uid_base=BASE),
        pool=(PoolSettings(spares=1),),
    )
    image = ContainerSpec(id="c", image="box", writable="disk", disk_size_mib=64, cmd=SLEEP)
    async with running(settings) as node:
        await node.images.import_("box", str(short_dir / "box"), call("image.import"))
        while not sum(status.ready for status in node.pods.pool.statuses()):
            await node.pods.pool.changed.wait()
            node.pods.pool.changed.clear()
        # A spare, which was a clone; and a clone, or a boot where there is no template yet.
        spare = await node.pods.run(PodSpec(id="p1", containers=(image,)), call("pod.run"))
        assert "pool" in spare.phases_ms
        other = await node.pods.run(
            PodSpec(id="p2", template="require", containers=(image,)), call("pod.run")
        )
        users = {check_confined(pid_of(status)) for status in (spare, other)}
        assert len(users) == 2
        assert await said(node, "p1", "c", "echo kept > /file; cat /file") == "kept\n"
        shared = ContainerSpec(id="d", rootfs=str(short_dir / "box"), cmd=SLEEP)
        await node.pods.create_container("p2", shared, call("container.create"))
        with pytest.raises(FailedPreconditionError, match=r"qemu\.uid_base"):
            await node.pods.start_container("p2", "d", call("container.start"))
    # Another process of the node agent takes both over, and can still take disks away and end them.
    async with running(settings) as node:
        try:
            pid = pid_of(node.pods.status("p1"))
            assert spare.hypervisor is not None
            check_bounded(spare.hypervisor.vm_id, pid)
            names = open_files(pid)
            files = {n for n in names if n.startswith("/") and not n.startswith(("/dev/", "/memfd:"))}
            vm_dir = f"{settings.run_dir.resolve()}/vms/{spare.hypervisor.vm_id}"
            expected = (
                f"{settings.state_dir.resolve()}/images/",
                f"{settings.state_dir.resolve()}/layers/",
                vm_dir,
            )
            # Kernel and initramfs were inherited, read-only; the rest is its disks and its own directory.
            boot = {str(guest_image.resolve() / name) for name in ("vmlinux", "initrd")}
            assert [n for n in files - boot if not n.startswith(expected)] == []
            await node.pods.delete_container("p1", "c", True, call("container.delete"))
            assert not any("/layers/" in n or "/images/" in n for n in open_files(pid))
            # With a directory of the host the pod needs root, and has it from its next start on.
            await node.pods.stop("p2", 0, call("pod.stop"))
            rooted = await node.pods.start("p2", call("pod.start"))
            assert set(facts(pid_of(rooted))["Uid"]) == {"0"}
            assert await said(node, "p2", "d", "cat /bin/busybox | wc -c") != "0\n"
            booted = await node.pods.run(
                PodSpec(id="p3", template="never", containers=(image,)), call("pod.run")
            )
            check_confined(pid_of(booted))
        finally:
            for pod_id in ("p1", "p2", "p3"):
                await node.pods.delete(pod_id, True, call("pod.delete"))
    assert list((settings.run_dir / "vms").iterdir()) == []
