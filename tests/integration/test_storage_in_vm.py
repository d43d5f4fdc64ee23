"""Host directories and images as a real guest has them, and what a hostile guest can do with them."""

from __future__ import annotations

import os
import secrets
import stat
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.guest_here import make_busybox
from vcnode.aio import Tasks
from vcnode.drivers.agent.native import NativeAgent
from vcnode.drivers.base import GuestSession, Vm
from vcnode.drivers.hypervisor.qemu import Guest, QemuHypervisor
from vcnode.drivers.storage.local import LocalStorage
from vcnode.models.vm import ContainerRoot, Disk, GuestConfig, GuestContainer, GuestProcess, VmSpec
from vcnode.settings import QemuSettings

pytestmark = [pytest.mark.vm, pytest.mark.timeout(180)]
LIMIT_S = 30.0
ALL_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID")


@dataclass
class Rig:
    storage: LocalStorage
    roots: Path
    vm: Vm
    session: GuestSession
    vm_id: str

    async def shell(self, script: str, *, container_id: str | None = "c1") -> tuple[int, str]:
        process = GuestProcess(args=("/bin/sh", "-c", script), capabilities=ALL_CAPABILITIES)
        running = await self.session.execute(process, container_id=container_id, timeout_s=LIMIT_S)
        try:
            await running.close_stdin()
            output = b"".join([data async for _, data in running.output()])
            return (await running.wait()).exit_code, output.decode()
        finally:
            await running.close()

    async def container(self, container_id: str, root: ContainerRoot) -> None:
        await self.session.create_container(
            GuestContainer(
                container_id=container_id,
                root=root,
                hostname="box",
                process=GuestProcess(args=("/bin/sleep", "1000"), capabilities=ALL_CAPABILITIES),
            ),
            timeout_s=LIMIT_S,
        )
        await self.session.start_container(container_id, timeout_s=LIMIT_S)


@pytest.fixture
async def rig(short_dir: Path, guest_image: Path):
    roots = short_dir / "roots"
    make_busybox(roots / "box")
    os.chmod(roots / "box" / "bin" / "busybox", 0o4755)
    storage = LocalStorage(short_dir / "state", short_dir / "run", [roots])
    await storage.open()
    vm_id = f"vm-{secrets.token_hex(6)}"
    guest = Guest(kernel=guest_image / "vmlinux", initrd=guest_image / "initrd")
    async with Tasks() as tasks:
        hypervisor = QemuHypervisor(
            QemuSettings(accel="tcg"), guest, state_dir=short_dir / "state", tasks=tasks
        )
        await hypervisor.open()
        directory = await storage.make_vm_dir(vm_id)
        vm = session = None
        try:
            spec = VmSpec(
                vm_id=vm_id,
                uuid=str(uuid.uuid4()),
                vcpu_count=1,
                mem_size_mib=256,
                directory=str(directory),
                shared_dir=str(directory / "shared"),
            )
            vm = await hypervisor.launch(spec, timeout_s=LIMIT_S)
            session = await NativeAgent().connect(vm, timeout_s=120)
            config = GuestConfig(
                hostname="box", time_ns=time.time_ns(), entropy=os.urandom(32), machine_id="0" * 32
            )
            await session.configure(config, timeout_s=LIMIT_S)
            yield Rig(storage, roots, vm, session, vm_id)
        finally:
            if session is not None:
                await session.close()
            if vm is not None:
                await vm.stop(grace_s=0)
            await storage.remove_vm_dir(vm_id)
            await hypervisor.close()
    assert (roots / "box" / "bin" / "busybox").exists()
    assert list(await storage.vm_ids()) == []


async def test_shared_directories_and_images_in_a_guest(rig: Rig, short_dir: Path):
    """One VM for all of it: a boot costs seconds."""
    box = rig.roots / "box"
    (box / "to-host").symlink_to(short_dir)
    await rig.storage.share(rig.vm_id, "c1", str(box))
    await rig.container("c1", ContainerRoot(shared_name="c1"))

    # Both ways, owners and modes included; set-uid bits are there although the host's mount forbids them.
    assert await rig.shell("echo hello > /tmp/new; chown 7:8 /tmp/new; chmod 640 /tmp/new") == (0, "")
    new = (box / "tmp" / "new").stat()
    assert (stat.S_IMODE(new.st_mode), new.st_uid, new.st_gid) == (0o640, 7, 8)
    assert await rig.shell("stat -c %a /bin/busybox") == (0, "4755\n")
    # Links mean the container's own paths.
    code, _ = await rig.shell("ls /to-host/")
    assert code != 0
    code, text = await rig.shell("mkdir -p /a/b && ln -s b /a/l && echo x > /a/l/f && cat /a/b/f && rm -r /a")
    assert (code, text) == (0, "x\n")

    # In the guest itself, as its root, next to the shares: nothing can be made, renamed or removed there.
    attacks = ("touch x", "mkdir x", "mv c1 c2", "rmdir c1", "mknod x b 254 0", "chmod 777 .", "ln -s / x")
    tries = "; ".join(f"{attack} 2>/dev/null && echo did {attack}" for attack in attacks)
    script = f"cd /run/vcnode/shared && ls && touch c1/made; {tries}; true"
    assert await rig.shell(script, container_id=None) == (0, "c1\n")
    assert (box / "made").exists()
    assert os.listdir(Path(rig.vm.record.directory) / "shared") == ["c1"]

    # An image, built of the same directory, plugged into the running VM.
    image = await rig.storage.build_image(str(box), timeout_s=60)
    await rig.vm.attach_disk(Disk(disk_id="d-0123456789abcdef", path=str(image.path)), timeout_s=LIMIT_S)
    await rig.container("c2", ContainerRoot(disk_id="d-0123456789abcdef"))
    assert await rig.shell("stat -c %a:%u /bin/busybox /tmp/new", container_id="c2") == (0, "4755:0\n640:7\n")
    assert await rig.shell("echo changed > /tmp/new && cat /tmp/new", container_id="c2") == (0, "changed\n")
    assert (box / "tmp" / "new").read_text() == "hello\n"

    await _writable_disk(rig, "d-0123456789abcdef")

    # A share is taken away under a running container: that one loses its files, and the host is clean.
    await rig.storage.unshare(rig.vm_id, "c1")
    assert os.listdir(Path(rig.vm.record.directory) / "shared") == []
    assert await rig.shell("cat /tmp/new", container_id="c2") == (0, "changed\n")
    assert (box / "tmp" / "new").read_text() == "hello\n"


async def _writable_disk(rig: Rig, image_id: str) -> None:
    """A layer on a disk outlives its container, and has a bound."""
    layer_id = "vm-0123456789ab"
    layer = await rig.storage.make_layer(layer_id, 64, timeout_s=LIMIT_S)
    disk = Disk(disk_id=layer_id, path=str(layer.path), read_only=False)
    root = ContainerRoot(disk_id=image_id, layer_disk_id=layer_id)
    assert await _with_layer(rig, disk, root, "stat -c %a /; echo kept > /tmp/new") == (0, "755\n")
    script = "cat /tmp/new; dd if=/dev/zero of=/big bs=1M count=80 2>&1 | grep -o 'No space'"
    assert await _with_layer(rig, disk, root, script) == (0, "kept\nNo space\n")
    await rig.storage.remove_layer(layer_id)


async def _with_layer(rig: Rig, disk: Disk, root: ContainerRoot, script: str) -> tuple[int, str]:
    """Run *script* in a container on that root, and take all of it out of the guest again."""
    await rig.vm.attach_disk(disk, timeout_s=LIMIT_S)
    await rig.container("c3", root)
    done = await rig.shell(script, container_id="c3")
    await rig.session.delete_container("c3", timeout_s=LIMIT_S)
    await rig.vm.detach_disk(disk.disk_id, timeout_s=LIMIT_S)
    return done
