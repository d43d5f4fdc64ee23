"""A real VM with the real guest image, started by a bare QEMU command line: no driver in between."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.integration.guest_here import make_busybox


@dataclass
class GuestVm:
    """A VM that may still be booting."""

    process: subprocess.Popen[bytes]
    directory: Path
    share: Path
    agent_socket: Path
    qmp_socket: Path
    console: Path


def host_tsc_khz() -> int | None:
    """What /proc/cpuinfo says; the guest cannot calibrate it on a busy host without KVM."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("cpu MHz"):
            return round(float(line.split(":")[1]) * 1000)
    return None


@contextlib.contextmanager
def guest_vm(image: Path, *, mem_mib: int = 256) -> Iterator[GuestVm]:
    """Boot the guest image in directory *image*; the VM is killed afterwards."""
    with tempfile.TemporaryDirectory(prefix="vcnode-vm-") as name:
        directory = Path(name)
        share = directory / "shared"
        make_busybox(share / "busybox")
        vm = GuestVm(
            process=None,  # type: ignore[arg-type]
            directory=directory,
            share=share,
            agent_socket=directory / "agent.sock",
            qmp_socket=directory / "qmp.sock",
            console=directory / "console.log",
        )
        tsc = f" tsc_early_khz={khz} tsc=reliable" if (khz := host_tsc_khz()) else ""
        # fmt: off
        command = [
            "qemu-system-x86_64", "-M", "microvm,accel=tcg", "-cpu", "max,-erms", "-m", str(mem_mib),
            "-smp", "1", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-serial", f"file:{vm.console}",
            "-kernel", str(image / "vmlinux"), "-initrd", str(image / "initrd"),
            "-append", f"console=ttyS0 quiet panic=-1 reboot=t{tsc}",
            "-qmp", f"unix:{vm.qmp_socket},server=on,wait=off",
            "-device", "virtio-serial-device,id=vs0,max_ports=4",
            "-chardev", f"socket,id=ch0,path={vm.agent_socket},server=on,wait=off",
            "-device", "virtserialport,bus=vs0.0,chardev=ch0,name=vcnode.agent.0",
            "-device", "virtio-scsi-device,id=scsi0",
            "-fsdev", f"local,id=fs0,path={share},security_model=none",
            "-device", "virtio-9p-device,fsdev=fs0,mount_tag=vcnode-shared",
        ]
        # fmt: on
        vm.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            wait_for_socket(vm)
            yield vm
        finally:
            vm.process.kill()
            vm.process.wait()


def wait_for_socket(vm: GuestVm) -> None:
    """QEMU makes its sockets within milliseconds of its start; nothing announces them."""
    import time

    deadline = time.monotonic() + 10
    while not vm.agent_socket.exists():
        assert vm.process.poll() is None, "QEMU ended at once"
        assert time.monotonic() < deadline, "QEMU made no socket"
        time.sleep(0.01)
