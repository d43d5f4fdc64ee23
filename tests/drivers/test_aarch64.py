"""QEMU's driver with guests of aarch64, whatever the host is: under TCG."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from tests.support import machines
from tests.support.guests import make_spec
from vcnode.aio import Tasks
from vcnode.drivers.hypervisor.qemu import QemuHypervisor, accel
from vcnode.drivers.hypervisor.qemu.machines import ARCHITECTURES
from vcnode.models.hypervisor import DiskFormat
from vcnode.models.vm import DiskFile, VmConfig
from vcnode.settings import QemuSettings

AARCH64 = ARCHITECTURES["aarch64"]
LIMIT_S = 120.0

pytestmark = pytest.mark.skipif(
    shutil.which(AARCH64.qemu) is None, reason=f"no {AARCH64.qemu}: install {AARCH64.package}"
)


async def test_the_probe_ends_its_machine():
    path = shutil.which(AARCH64.qemu) or ""
    assert await accel.try_accelerator("tcg", path, timeout_s=60, arch=AARCH64) is None


@pytest.mark.vm
@pytest.mark.timeout(200)
@pytest.mark.skipif(
    not list(machines.AARCH64.glob("*.deb")), reason="no packages for aarch64: run dev/aarch64"
)
async def test_a_guest_boots_with_all_its_devices(short_dir: Path):
    guest = await asyncio.to_thread(machines.aarch64_guest, short_dir)
    disk = short_dir / "disk"
    disk.write_bytes(bytes(1 << 20))
    fd = os.open(disk, os.O_RDONLY)
    async with Tasks() as tasks:
        qemu = QemuHypervisor(
            QemuSettings(accel="tcg"), guest, state_dir=short_dir / "s", tasks=tasks, architecture=AARCH64
        )
        await qemu.open()
        try:
            only_read = DiskFile(fd=fd, format=DiskFormat.RAW, read_only=True)
            config = VmConfig(disks=(only_read,), initrd=str(guest.initrd))
            spec = make_spec(short_dir / "r", vcpu_count=2, mem_size_mib=256, config=config)
            vm = await qemu.launch(spec, timeout_s=30)
            async with asyncio.timeout(LIMIT_S):
                found = await vm.wait()
        finally:
            os.close(fd)
            await qemu.close()
    said = Path(spec.directory, "console.log").read_text()
    assert "this is aarch64 with 2 CPUs" in said, said
    assert "console=ttyAMA0 quiet initcall_blacklist=tracer_init_tracefs panic=-1" in said
    for driver in ("virtio_console", "virtio_scsi", "9pnet_virtio", "virtio_blk"):
        assert f"virtio {driver}" in said
    assert "ended by itself" in found.reason or found.exit_code == 0, found
