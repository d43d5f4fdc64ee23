"""The small world of the mock hypervisor: machines that live until somebody ends them.

The world belongs to no driver, as VMs belong to no node agent: a test that gives the same world to a second
driver has restarted the node.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from vcnode.models.vm import Disk, VmExit, VmSpec


@dataclass(slots=True)
class MockMachine:
    """One pretended VM."""

    spec: VmSpec
    """As launched."""
    mem_size_mib: int = 0
    """Memory that its guest has now."""
    running: bool = True
    """False while its vCPUs are paused."""
    disks: dict[str, Disk] = field(default_factory=dict)
    """Attached disks by id."""
    exit: VmExit | None = None
    """How it ended; None while it lives."""
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.exit is None

    def end(self, exit_: VmExit) -> None:
        """End it; the first reason stands."""
        if self.exit is None:
            self.exit = exit_
            self.disks.clear()
            self._ended.set()

    async def ended(self) -> None:
        """Wait until it has ended."""
        await self._ended.wait()


class MockWorld:
    """Every VM that was ever launched in it."""

    def __init__(self) -> None:
        self.machines: dict[str, MockMachine] = {}
        """By VM id, the ended ones too."""
        self.templates: dict[str, str] = {}
        self.template_facts: dict[str, tuple[int, float]] = {}
        """The VM that each was made of, by key."""

    @property
    def launched(self) -> int:
        """How many VMs were launched."""
        return len(self.machines)

    @property
    def alive(self) -> list[MockMachine]:
        """The VMs that live."""
        return [machine for machine in self.machines.values() if machine.alive]

    def die(self, vm_id: str, reason: str = "The VM died.") -> None:
        """End a VM as if its process had been killed from outside; nothing if it has ended."""
        if machine := self.machines.get(vm_id):
            machine.end(VmExit(expected=False, exit_code=-9, reason=reason))
