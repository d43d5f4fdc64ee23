"""Guests of a few lines of shell, for tests that need a kernel and no agent."""

from __future__ import annotations

import uuid
from pathlib import Path

from vcnode.drivers.hypervisor.qemu import Guest
from vcnode.guest.image.cpio import CharDevice, File, Symlink, Tree, pack
from vcnode.models.vm import VmSpec

IDLE = "echo idle; exec sleep 1000000"
POWER_OFF = "echo bye; reboot -f"
PANIC = "echo bye; exit 3"
FLOOD = "yes 0123456789012345678901234567890123456789012345678901234567890"


def shell_guest(image: Path, directory: Path, script: str) -> Guest:
    """The kernel of the guest image in *image*, with busybox and *script* as its init."""
    tree = Tree()
    tree.add("/bin/busybox", File(Path("/bin/busybox").read_bytes(), 0o755))
    for applet in ("sh", "sleep", "reboot", "yes", "mount", "cat"):
        tree.add(f"/bin/{applet}", Symlink("busybox"))
    tree.add("/dev/console", CharDevice(5, 1))
    tree.add("/dev/null", CharDevice(1, 3, 0o666))
    tree.add("/init", File(f"#!/bin/sh\n{script}\n".encode(), 0o755))
    initrd = directory / f"initrd-{uuid.uuid4().hex}"
    initrd.write_bytes(pack(tree))
    return Guest(image / "vmlinux", initrd)


def make_spec(run_dir: Path, **changes: object) -> VmSpec:
    """A new VM with a directory of its own below *run_dir*."""
    vm_id = f"vm-{uuid.uuid4().hex[:12]}"
    directory = run_dir / "vms" / vm_id
    (directory / "shared").mkdir(parents=True)
    return VmSpec(
        vm_id=vm_id,
        uuid=str(uuid.uuid4()),
        vcpu_count=1,
        mem_size_mib=128,
        directory=str(directory),
        shared_dir=str(directory / "shared"),
    ).model_copy(update=changes)
