"""A hypervisor whose VMs are guests with hyperstart: sockets in their directories, and no VM."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

from tests.support.hyperstart import FakeHyperstart
from vcnode.aio import Spawner
from vcnode.drivers.agent.hyperstart import HyperstartAgent
from vcnode.drivers.agent.hyperstart.session import HyperSession
from vcnode.drivers.base import AgentAccess, Vm
from vcnode.drivers.hypervisor.mock import MockHypervisor, MockVm
from vcnode.models.node import DriverInfo
from vcnode.models.pod import AgentConfig, HyperConfig, HypervisorType
from vcnode.models.vm import VmExit, VmRecord, VmSpec


class SocketVm:
    """A VM of which there are sockets."""

    def __init__(self, directory: Path) -> None:
        self.record = VmRecord(
            vm_id="vm-0123456789ab", uuid="u", directory=str(directory), type=HypervisorType.QEMU
        )

    def channel(self, channel_id: str) -> Path:
        """Where a channel's socket is."""
        return Path(self.record.directory, f"{channel_id}.sock")


async def connect_to(vm: SocketVm | Vm, *, fork: bool = False, timeout_s: float) -> HyperSession:
    """A session with the guest of *vm*."""
    config = AgentConfig(hyperstart=HyperConfig(dialect="clearcontainers" if fork else "hyperhq"))
    session = await HyperstartAgent().connect(cast(Vm, vm), access=AgentAccess(config), timeout_s=timeout_s)
    return cast(HyperSession, session)


class HyperstartVms(MockHypervisor):
    """Pretends to be QEMU. The VMs outlive the node agent, as long as this lives.

    Args:
        tasks: Owner of what watches each VM.
        version: Of hyperstart in its guests.
    """

    def __init__(self, tasks: Spawner, version: int = 4244, *, fork: bool = False) -> None:
        super().__init__()
        self._tasks = tasks
        self._version = version
        self._fork = fork
        self.guests: list[FakeHyperstart] = []

    @property
    def info(self) -> DriverInfo:
        """As QEMU's."""
        return DriverInfo(
            type=HypervisorType.QEMU, capabilities=("disks", "initrd", "kernel", "pause", "share")
        )

    async def launch(self, spec: VmSpec, *, timeout_s: float) -> MockVm:
        """Boot a guest."""
        vm = await super().launch(spec, timeout_s=timeout_s)
        directory = Path(spec.directory)
        directory.mkdir(parents=True, exist_ok=True)
        guest = FakeHyperstart(directory, self._version, fork=self._fork)
        await guest.start()
        self.guests.append(guest)
        self._tasks.spawn(self._power_off(spec.vm_id, guest), name=f"power-off of {spec.vm_id}")
        self._tasks.spawn(self._end(spec.vm_id, guest), name=f"end of {spec.vm_id}")
        return vm

    async def _power_off(self, vm_id: str, guest: FakeHyperstart) -> None:
        await guest.off.wait()
        self.world.machines[vm_id].end(VmExit(expected=True, exit_code=0, reason="The guest powered off."))

    async def _end(self, vm_id: str, guest: FakeHyperstart) -> None:
        await self.world.machines[vm_id].ended()
        await guest.stop()

    async def stopped(self) -> None:
        """Wait until all guests have ended."""
        await asyncio.gather(*(guest.off.wait() for guest in self.guests))
