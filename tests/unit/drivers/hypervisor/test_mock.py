"""vcnode.drivers.hypervisor.mock: faults in front of each call, and a world that tests can look at."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.guests import make_spec
from vcnode.drivers.base import Hypervisor, Vm
from vcnode.drivers.faults import FaultPlan
from vcnode.drivers.hypervisor.mock import MockHypervisor, MockVm, MockWorld
from vcnode.errors import HypervisorError
from vcnode.models.vm import Disk


async def launch(plan: str, run_dir: Path) -> tuple[MockHypervisor, MockVm]:
    node = MockHypervisor(FaultPlan.parse(plan))
    return node, await node.launch(make_spec(run_dir), timeout_s=1)


async def test_it_is_a_hypervisor_that_says_it_is_a_mock(tmp_path: Path):
    node, made = await launch("", tmp_path)
    hypervisor: Hypervisor = node
    vm: Vm = made
    assert hypervisor.info.mock
    assert hypervisor.accelerator is None
    assert vm.record.pid is None


async def test_a_launch_that_fails_leaves_nothing(tmp_path: Path):
    node = MockHypervisor(FaultPlan.parse("hypervisor.launch:1=fail"))
    with pytest.raises(HypervisorError):
        await node.launch(make_spec(tmp_path), timeout_s=1)
    assert node.world.launched == 0
    await node.launch(make_spec(tmp_path), timeout_s=1)
    assert len(node.world.alive) == 1


async def test_a_launch_that_hangs_ends_at_its_limit(tmp_path: Path):
    node = MockHypervisor(FaultPlan.parse("hypervisor.launch:1=hang"))
    with pytest.raises(HypervisorError, match=r"within 0\.01 s"):
        await node.launch(make_spec(tmp_path), timeout_s=0.01)
    assert node.world.launched == 0


async def test_the_nth_vm_dies_at_once(tmp_path: Path):
    node, first = await launch("vm:2=die", tmp_path)
    second = await node.launch(make_spec(tmp_path), timeout_s=1)
    found = await second.wait()
    assert not found.expected
    assert "fault plan" in found.reason
    assert [machine.spec.vm_id for machine in node.world.alive] == [first.record.vm_id]


async def test_a_vm_dies_some_time_after_its_launch(tmp_path: Path):
    node, vm = await launch("vm:1=die(0.01)", tmp_path)
    assert node.world.alive
    assert not (await asyncio.wait_for(vm.wait(), 5)).expected


async def test_a_vm_dies_during_a_call(tmp_path: Path):
    _, vm = await launch("vm.attach_disk:1=die", tmp_path)
    with pytest.raises(HypervisorError):
        await vm.attach_disk(Disk(disk_id="d-1", path="/x"), timeout_s=1)
    assert (await vm.wait()).exit_code == -9


async def test_a_vm_that_dies_while_it_is_stopped_is_absent(tmp_path: Path):
    _, vm = await launch("vm.stop:1=die", tmp_path)
    assert await vm.stop(grace_s=1) == "absent"


async def test_a_guest_powers_off_within_any_grace_but_none(tmp_path: Path):
    node, vm = await launch("", tmp_path)
    assert await vm.stop(grace_s=0.1) == "graceful"
    other = await node.launch(make_spec(tmp_path), timeout_s=1)
    assert await other.stop(grace_s=0) == "forced"


async def test_a_cancelled_stop_finishes_the_kill(tmp_path: Path):
    node, vm = await launch("vm.stop:1=hang", tmp_path)
    stopping = asyncio.ensure_future(vm.stop(grace_s=100))
    await asyncio.wait({stopping}, timeout=0.01)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert node.world.alive == []


async def test_disks_are_in_the_world(tmp_path: Path):
    node, vm = await launch("", tmp_path)
    disk = Disk(disk_id="d-1", path="/x")
    await vm.attach_disk(disk, timeout_s=1)
    assert node.world.alive[0].disks == {"d-1": disk}
    await vm.detach_disk("d-1", timeout_s=1)
    assert node.world.alive[0].disks == {}


async def test_vms_survive_a_restart_of_the_node_in_the_same_world(tmp_path: Path):
    world = MockWorld()
    vm = await MockHypervisor(world=world).launch(make_spec(tmp_path), timeout_s=1)
    again = await MockHypervisor(world=world).recover(vm.record, timeout_s=1)
    assert again is not None
    assert again.record == vm.record
    assert await MockHypervisor().recover(vm.record, timeout_s=1) is None


async def test_the_same_vm_cannot_be_launched_twice(tmp_path: Path):
    node = MockHypervisor()
    spec = make_spec(tmp_path)
    await node.launch(spec, timeout_s=1)
    with pytest.raises(HypervisorError):
        await node.launch(spec, timeout_s=1)
