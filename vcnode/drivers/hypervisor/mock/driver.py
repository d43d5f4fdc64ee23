"""Protocol Hypervisor over a `MockWorld`, with a fault plan in front of each call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from vcnode.aio import deadline_as
from vcnode.drivers.audit import Held
from vcnode.drivers.base import TemplateInfo, Vm
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.hypervisor.mock.world import MockMachine, MockWorld
from vcnode.errors import HypervisorError, NotFoundError, UnsupportedError
from vcnode.models.hypervisor import HypervisorConfig
from vcnode.models.node import DriverInfo
from vcnode.models.pod import HypervisorType, Resources, StopOutcome
from vcnode.models.stats import CpuStats, VmStats, idle_interface
from vcnode.models.vm import Disk, Port, VmExit, VmRecord, VmShape, VmSpec, channel_socket

STOP_LIMIT_S = 5.0
"""Most that a fault may hold ``stop`` beyond its grace: the real ladder is bounded as well."""
ENDED_BY_NODE = "The VM was ended by its node."


class MockVm:
    """Handle of one pretended VM."""

    def __init__(self, machine: MockMachine, plan: FaultPlan) -> None:
        self._machine = machine
        self._plan = plan

    @property
    def record(self) -> VmRecord:
        """The same at any time: a pretended VM has no process."""
        return make_record(self._machine.spec)

    def channel(self, channel_id: str) -> Path:
        """A path as QEMU's driver would give; nobody listens there."""
        return channel_socket(self._machine.spec.directory, channel_id)

    @property
    def restore_s(self) -> float | None:
        """0 for a clone."""
        return None if self._machine.spec.clone_of is None else 0.0

    @property
    def paused(self) -> bool:
        """See Protocol Vm."""
        return not self._machine.running

    async def wait(self) -> VmExit:
        """See Protocol Vm."""
        await self._machine.ended()
        return _exit_of(self._machine)

    async def attach_disk(self, disk: Disk, *, timeout_s: float) -> None:
        """See Protocol Vm. Looks at no file."""
        async with self._operation("attach_disk", timeout_s):
            self._need_alive("attach_disk")
            if disk.disk_id in self._machine.disks:
                raise HypervisorError(f"VM {self._id} has a disk {disk.disk_id} already.")
            self._machine.disks[disk.disk_id] = disk

    async def detach_disk(self, disk_id: str, *, timeout_s: float) -> None:
        """See Protocol Vm."""
        async with self._operation("detach_disk", timeout_s):
            self._machine.disks.pop(disk_id, None)

    async def attach_port(self, port: Port, *, timeout_s: float) -> None:
        """See Protocol Vm. Looks at no descriptor."""
        async with self._operation("attach_port", timeout_s):
            self._need_alive("attach_port")

    async def pause(self, *, timeout_s: float) -> None:
        """See Protocol Vm."""
        async with self._operation("pause", timeout_s):
            self._need_alive("pause")
            self._machine.running = False

    async def resume(self, *, timeout_s: float) -> None:
        """See Protocol Vm."""
        async with self._operation("resume", timeout_s):
            self._need_alive("resume")
            self._machine.running = True

    async def read_console(self, max_bytes: int, *, timeout_s: float) -> str:
        """See `Vm.read_console`: a pretended guest says that it is one."""
        self._need_alive("read_console")
        return "This guest only pretends."[-max_bytes:]

    async def read_stats(
        self, *, mem_size_mib: int, interfaces: Mapping[str, str], memory: bool, timeout_s: float
    ) -> VmStats:
        """See Protocol Measurable. A VM that only pretends takes nothing, but has what was asked for."""
        async with self._operation("read_stats", timeout_s):
            self._need_alive("read_stats")
            return VmStats(
                cpu=CpuStats(usage_us=0, user_us=0, system_us=0),
                thread_count=0,
                resident_bytes=0,
                pss_bytes=0 if memory else None,
                guest_pss_bytes=0 if memory else None,
                overhead_bytes=0 if memory else None,
                read_bytes=0,
                written_bytes=0,
                interfaces=tuple(idle_interface(name) for name in interfaces.values()),
            )

    async def set_memory(self, mem_size_mib: int, *, timeout_s: float) -> None:
        """See Protocol Vm. The pretended guest gives back whatever is wanted."""
        async with self._operation("set_memory", timeout_s):
            self._need_alive("set_memory")
            if not self._machine.spec.balloon:
                raise UnsupportedError(f"VM {self._id} has no balloon.")
            self._machine.mem_size_mib = mem_size_mib

    async def stop(self, *, grace_s: float) -> StopOutcome:
        """See Protocol Vm. The pretended guest powers off within any grace but 0, unless it is paused."""
        if not self._machine.alive:
            return "absent"
        try:
            async with self._operation("stop", grace_s + STOP_LIMIT_S):
                if not self._machine.alive:  # the plan let it die meanwhile
                    return "absent"
                graceful = grace_s > 0 and self._machine.running
                self._end("The guest powered off." if graceful else ENDED_BY_NODE)
                return "graceful" if graceful else "forced"
        except asyncio.CancelledError:
            self._end(ENDED_BY_NODE)  # as the Protocol wants: first the kill, then the cancellation
            raise

    def _end(self, reason: str) -> None:
        self._machine.end(VmExit(expected=True, exit_code=0, reason=reason))

    async def close(self) -> None:
        """See Protocol Vm."""

    @property
    def _id(self) -> str:
        return self._machine.spec.vm_id

    def _need_alive(self, verb: str) -> None:
        if not self._machine.alive:
            raise HypervisorError(f"VM {self._id} has ended; {verb} needs it to run.")

    @contextlib.asynccontextmanager
    async def _operation(self, verb: str, timeout_s: float) -> AsyncIterator[None]:
        async with _bounded(f"vm.{verb}", self._id, timeout_s):
            await self._plan.hit(f"vm.{verb}", vm_id=self._id)
            yield


class MockHypervisor:
    """Protocol Hypervisor without VMs.

    Args:
        plan: Faults; an empty plan if None.
        world: Where the VMs live; a new one if None. Two drivers on one world are one node, restarted.
        templates: Whether to offer templates; their VMs count in the fault plan like any other.
    """

    def __init__(
        self, plan: FaultPlan | None = None, *, world: MockWorld | None = None, templates: bool = False
    ) -> None:
        self._templates = templates
        self.world = MockWorld() if world is None else world
        self._plan = FaultPlan() if plan is None else plan
        self._plan.on_die(self._die)

    @property
    def info(self) -> DriverInfo:
        """Marked as a mock."""
        return DriverInfo(
            type=HypervisorType.MOCK,
            capabilities=(
                *("balloon", "disks", "firmware", "image", "initrd", "kernel", "pause", "ports", "share"),
                *("stats", "virtio-fs"),
                *(("templates",) if self._templates else ()),
            ),
            mock=True,
            notes=("No VM runs here: the mock hypervisor only pretends.",),
        )

    @property
    def accelerator(self) -> str | None:
        """None: nothing runs."""
        return None

    async def open(self) -> None:
        """Nothing to probe."""

    def check(self, config: HypervisorConfig, resources: Resources) -> None:
        """See `Hypervisor.check`: a pretended VM can be anything."""

    async def launch(self, spec: VmSpec, *, timeout_s: float) -> MockVm:
        """See Protocol Hypervisor."""
        async with _bounded("hypervisor.launch", spec.vm_id, timeout_s):
            await self._plan.hit("hypervisor.launch", vm_id=spec.vm_id)
            if spec.clone_of is not None:
                await self._plan.hit("hypervisor.clone", vm_id=spec.vm_id)
                if spec.clone_of not in self.world.templates:
                    raise NotFoundError(f"There is no template {spec.clone_of}.")
        if (known := self.world.machines.get(spec.vm_id)) is not None and known.alive:
            raise HypervisorError(f"VM {spec.vm_id} exists already.")
        machine = self.world.machines[spec.vm_id] = MockMachine(spec)
        await self._plan.hit("vm", vm_id=spec.vm_id)
        return MockVm(machine, self._plan)

    async def recover(self, record: VmRecord, *, timeout_s: float) -> MockVm | None:
        """See Protocol Hypervisor."""
        async with _bounded("hypervisor.recover", record.vm_id, timeout_s):
            await self._plan.hit("hypervisor.recover", vm_id=record.vm_id)
        machine = self._find(record)
        return MockVm(machine, self._plan) if machine else None

    async def kill(self, record: VmRecord, *, timeout_s: float) -> bool:
        """See Protocol Hypervisor."""
        async with _bounded("hypervisor.kill", record.vm_id, timeout_s):
            await self._plan.hit("hypervisor.kill", vm_id=record.vm_id)
        machine = self._find(record)
        if machine is None:
            return False
        machine.end(VmExit(expected=True, exit_code=-9, reason=ENDED_BY_NODE))
        return True

    async def held(self, mark: str) -> Sequence[Held]:
        """See Protocol Auditable."""
        await self._plan.hit("hypervisor.held")
        ids = [machine.spec.vm_id for machine in self.world.alive]
        return [Held("process", f"mock of {vm_id}", vm_id) for vm_id in ids if vm_id.startswith(mark)]

    async def free(self, held: Held, *, timeout_s: float) -> None:
        """See Protocol Auditable."""
        await self._plan.hit("hypervisor.free", vm_id=held.vm_id)
        self.world.die(held.vm_id or "", ENDED_BY_NODE)

    def template_key(self, shape: VmShape) -> str:
        """See Protocol Templating."""
        return f"mock-{shape.vcpu_count}-{shape.mem_size_mib}-{shape.netdev_count}"

    async def list_templates(self) -> Sequence[TemplateInfo]:
        """See Protocol Templating."""
        facts = self.world.template_facts
        return [TemplateInfo(key, *facts.get(key, (0, 0.0))) for key in self.world.templates]

    async def load_template(self, key: str, *, timeout_s: float) -> bool:
        """See Protocol Templating."""
        return key in self.world.templates

    async def save_template(self, vm: Vm, *, timeout_s: float) -> None:
        """See Protocol Templating."""
        async with _bounded("hypervisor.save_template", vm.record.vm_id, timeout_s):
            await self._plan.hit("hypervisor.save_template", vm_id=vm.record.vm_id)
        key = self.world.machines[vm.record.vm_id].spec.template_key
        if key is None:
            raise HypervisorError(f"VM {vm.record.vm_id} was not launched to become a template.")
        await vm.stop(grace_s=0)
        self.world.templates[key] = vm.record.vm_id

    async def drop_template(self, key: str) -> None:
        """See Protocol Templating."""
        self.world.templates.pop(key, None)

    async def close(self) -> None:
        """Nothing to free; the world stays."""

    def _find(self, record: VmRecord) -> MockMachine | None:
        machine = self.world.machines.get(record.vm_id)
        return machine if machine and machine.alive and machine.spec.uuid == record.uuid else None

    def _die(self, vm_id: str, seconds: float) -> None:
        reason = "The fault plan let the VM die."
        if seconds:
            asyncio.get_running_loop().call_later(seconds, self.world.die, vm_id, reason)
        else:
            self.world.die(vm_id, reason)


def make_record(spec: VmSpec) -> VmRecord:
    """The record of a pretended VM: no process, no accelerator."""
    return VmRecord(
        vm_id=spec.vm_id,
        uuid=spec.uuid,
        directory=spec.directory,
        type=HypervisorType.MOCK,
        balloon=spec.balloon,
    )


def _bounded(operation: str, vm_id: str, timeout_s: float) -> contextlib.AbstractAsyncContextManager[None]:
    return deadline_as(
        timeout_s,
        lambda: HypervisorError(f"{operation} of VM {vm_id} did not end within {timeout_s:g} s."),
    )


def _exit_of(machine: MockMachine) -> VmExit:
    if machine.exit is None:  # `ended` has just returned, and nothing brings a machine back
        raise HypervisorError(f"VM {machine.spec.vm_id} has no exit.")
    return machine.exit
