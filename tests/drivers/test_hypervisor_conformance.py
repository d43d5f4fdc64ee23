"""What every `Hypervisor` promises; the same tests on the mock and on QEMU, so that the mock cannot lie."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

import pytest

from tests.support import guests
from vcnode.aio import Tasks
from vcnode.drivers.base import Hypervisor, Vm
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.hypervisor.mock import MockHypervisor, MockWorld
from vcnode.drivers.hypervisor.qemu import QemuHypervisor
from vcnode.errors import HypervisorError, VcnodeError
from vcnode.models.vm import Disk, VmRecord, VmSpec
from vcnode.settings import QemuSettings

LIMIT_S = 30.0


class Rig(Protocol):
    """One kind of hypervisor under test, with power over its world."""

    run_dir: Path

    async def node(self) -> Hypervisor:
        """A driver as a freshly started node agent has it; the one before is gone, its VMs are not."""
        ...

    def kill(self, vm: Vm) -> None:
        """End a VM from outside."""
        ...

    def alive(self, record: VmRecord) -> bool:
        """Whether the VM lives, seen from outside."""
        ...

    async def close(self) -> None:
        """End everything."""
        ...


class MockRig:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.world = MockWorld()

    async def node(self) -> Hypervisor:
        return MockHypervisor(FaultPlan(), world=self.world)

    def kill(self, vm: Vm) -> None:
        self.world.die(vm.record.vm_id)

    def alive(self, record: VmRecord) -> bool:
        return self.world.machines[record.vm_id].alive

    async def close(self) -> None:
        pass


class QemuRig:
    def __init__(self, run_dir: Path, image: Path) -> None:
        self.run_dir = run_dir
        self._guest = guests.shell_guest(image, run_dir, guests.IDLE)
        self._tasks: Tasks | None = None
        self._hypervisor: QemuHypervisor | None = None

    async def node(self) -> Hypervisor:
        if self._tasks is not None:
            await self._tasks.close()
        self._tasks = Tasks()
        settings = QemuSettings(accel="tcg")
        self._hypervisor = QemuHypervisor(settings, self._guest, state_dir=self.run_dir, tasks=self._tasks)
        await self._hypervisor.open()
        return self._hypervisor

    def kill(self, vm: Vm) -> None:
        os.kill(vm.record.pid or 0, signal.SIGKILL)

    def alive(self, record: VmRecord) -> bool:
        return Path(f"/proc/{record.pid}/exe").exists()

    async def close(self) -> None:
        if self._tasks is not None:
            await self._tasks.close()


@pytest.fixture(params=["mock", pytest.param("qemu", marks=pytest.mark.vm)])
async def rig(request: pytest.FixtureRequest, short_dir: Path) -> AsyncIterator[Rig]:
    made: Rig
    if request.param == "mock":
        made = MockRig(short_dir)
    else:
        made = QemuRig(short_dir, request.getfixturevalue("guest_image"))
    yield made
    await made.close()


@pytest.fixture
async def node(rig: Rig) -> Hypervisor:
    return await rig.node()


@pytest.fixture
def spec(rig: Rig) -> Callable[[], VmSpec]:
    return lambda: guests.make_spec(rig.run_dir)


@pytest.fixture
async def vm(node: Hypervisor, spec: Callable[[], VmSpec]) -> AsyncIterator[Vm]:
    made = await node.launch(spec(), timeout_s=LIMIT_S)
    yield made
    await node.kill(made.record, timeout_s=LIMIT_S)
    await made.close()


@pytest.fixture
def disk(short_dir: Path) -> Disk:
    path = short_dir / "disk"
    path.write_bytes(bytes(1 << 20))
    return Disk(disk_id="d-0123456789abcdef", path=str(path))


async def test_a_launched_vm_lives_and_is_on_record(rig: Rig, node: Hypervisor, spec):
    wanted = spec()
    vm = await node.launch(wanted, timeout_s=LIMIT_S)
    record = vm.record
    assert rig.alive(record)
    assert (record.vm_id, record.uuid, record.directory) == (wanted.vm_id, wanted.uuid, wanted.directory)
    assert record.type == node.info.type
    assert vm.channel("agent") == Path(wanted.directory, "agent.sock")
    assert await vm.stop(grace_s=0) == "forced"
    assert not rig.alive(record)


async def test_stop_of_a_vm_that_is_gone_says_so(vm: Vm):
    assert await vm.stop(grace_s=0) == "forced"
    assert await vm.stop(grace_s=0) == "absent"
    found = await vm.wait()
    assert found.expected


async def test_a_paused_vm_gets_no_grace(vm: Vm):
    await vm.pause(timeout_s=LIMIT_S)
    assert await asyncio.wait_for(vm.stop(grace_s=3600), LIMIT_S) == "forced"


async def test_two_stops_at_once_both_end(rig: Rig, vm: Vm):
    outcomes = await asyncio.gather(vm.stop(grace_s=0), vm.stop(grace_s=0))
    assert "forced" in outcomes
    assert not rig.alive(vm.record)


async def test_the_end_from_outside_is_noticed_and_explained(rig: Rig, vm: Vm):
    waiting = [asyncio.ensure_future(vm.wait()) for _ in range(2)]
    rig.kill(vm)
    found = await asyncio.wait_for(vm.wait(), LIMIT_S)
    assert [await each for each in waiting] == [found, found]
    assert not found.expected
    assert found.exit_code == -9
    assert found.reason
    assert await vm.stop(grace_s=1) == "absent"


async def test_a_cancelled_wait_leaves_the_others_waiting(rig: Rig, vm: Vm):
    first, second = (asyncio.ensure_future(vm.wait()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    rig.kill(vm)
    assert (await asyncio.wait_for(second, LIMIT_S)).exit_code == -9


async def test_pause_and_resume_are_idempotent(vm: Vm):
    assert not vm.paused
    for _ in range(2):
        await vm.pause(timeout_s=LIMIT_S)
        assert vm.paused
    for _ in range(2):
        await vm.resume(timeout_s=LIMIT_S)
        assert not vm.paused


async def test_disks_come_and_go_and_come_again(vm: Vm, disk: Disk):
    for _ in range(2):
        await vm.attach_disk(disk, timeout_s=LIMIT_S)
        await vm.detach_disk(disk.disk_id, timeout_s=LIMIT_S)


async def test_detach_of_what_is_not_there_succeeds(vm: Vm, disk: Disk):
    await vm.detach_disk("d-nothing", timeout_s=LIMIT_S)
    await vm.attach_disk(disk, timeout_s=LIMIT_S)
    for _ in range(2):
        await vm.detach_disk(disk.disk_id, timeout_s=LIMIT_S)


async def test_an_id_can_be_attached_once_and_stays_attached(vm: Vm, disk: Disk):
    await vm.attach_disk(disk, timeout_s=LIMIT_S)
    with pytest.raises(HypervisorError):
        await vm.attach_disk(disk, timeout_s=LIMIT_S)
    await vm.detach_disk(disk.disk_id, timeout_s=LIMIT_S)


async def test_commands_to_a_dead_vm_fail_in_our_words(rig: Rig, vm: Vm, disk: Disk):
    rig.kill(vm)
    await vm.wait()
    for command in (
        vm.attach_disk(disk, timeout_s=LIMIT_S),
        vm.pause(timeout_s=LIMIT_S),
        vm.resume(timeout_s=LIMIT_S),
    ):
        with pytest.raises(VcnodeError):
            await command
    await vm.detach_disk(disk.disk_id, timeout_s=LIMIT_S)


async def test_a_restarted_node_finds_its_vm_again(rig: Rig, vm: Vm, disk: Disk):
    await vm.attach_disk(disk, timeout_s=LIMIT_S)
    await vm.close()
    again = await (await rig.node()).recover(vm.record, timeout_s=LIMIT_S)
    assert again is not None
    assert again.record == vm.record
    await again.detach_disk(disk.disk_id, timeout_s=LIMIT_S)
    rig.kill(again)
    assert not (await asyncio.wait_for(again.wait(), LIMIT_S)).expected


async def test_a_paused_vm_is_still_paused_after_a_restart(rig: Rig, vm: Vm):
    await vm.pause(timeout_s=LIMIT_S)
    await vm.close()
    again = await (await rig.node()).recover(vm.record, timeout_s=LIMIT_S)
    assert again is not None
    assert again.paused
    assert await asyncio.wait_for(again.stop(grace_s=3600), LIMIT_S) == "forced"


async def test_recover_of_a_vm_that_is_gone_gives_none(rig: Rig, vm: Vm):
    await vm.stop(grace_s=0)
    assert await (await rig.node()).recover(vm.record, timeout_s=LIMIT_S) is None


async def test_recover_wants_the_same_uuid(node: Hypervisor, rig: Rig, vm: Vm):
    other = vm.record.model_copy(update={"uuid": "00000000-0000-0000-0000-000000000000"})
    assert await node.recover(other, timeout_s=LIMIT_S) is None
    assert not await node.kill(other, timeout_s=LIMIT_S)
    assert rig.alive(vm.record)


async def test_kill_by_record_is_idempotent(rig: Rig, vm: Vm):
    await vm.close()
    node = await rig.node()
    assert await node.kill(vm.record, timeout_s=LIMIT_S)
    assert not rig.alive(vm.record)
    assert not await node.kill(vm.record, timeout_s=LIMIT_S)


async def test_a_record_from_before_the_launch_is_enough(rig: Rig, vm: Vm):
    """The node agent was killed after it had started the VM and before it could write down the process."""
    await vm.close()
    early = vm.record.model_copy(update={"pid": None, "pid_start_ticks": None, "accelerator": None})
    node = await rig.node()
    again = await node.recover(early, timeout_s=LIMIT_S)
    assert again is not None
    assert again.record.pid == vm.record.pid
    await again.close()
    assert await node.kill(early, timeout_s=LIMIT_S)
    assert not rig.alive(vm.record)


async def test_two_vms_live_beside_each_other(rig: Rig, node: Hypervisor, spec):
    one, two = await asyncio.gather(*(node.launch(spec(), timeout_s=LIMIT_S) for _ in range(2)))
    await one.stop(grace_s=0)
    assert rig.alive(two.record)
    await two.pause(timeout_s=LIMIT_S)
    await two.stop(grace_s=0)


async def test_closing_twice_is_harmless_and_ends_nothing(rig: Rig, vm: Vm):
    await vm.close()
    await vm.close()
    assert rig.alive(vm.record)
