"""Limits and memory that change while things run; crashes in the middle are swept in tests/faults."""

from __future__ import annotations

import pytest

from tests.unit.pods.world import World, container, pod
from vcnode.drivers.faults import FaultPlan
from vcnode.errors import (
    AgentError,
    FailedPreconditionError,
    HypervisorError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    StorageError,
)
from vcnode.models.pod import ContainerResources, PodSpec, PodState, Resources
from vcnode.settings import CapacitySettings


def limits(**changes: object) -> ContainerResources:
    return ContainerResources.model_validate(changes)


def in_guest(world: World, container_id: str = "c1") -> ContainerResources:
    (machine,) = world.vms.alive
    return world.guests.by_vm_id[machine.spec.vm_id].containers[container_id].spec.resources


def own_memory(pod_id: str = "p1", mib: int = 512) -> PodSpec:
    return pod(pod_id, template="never", resources=Resources(mem_size_mib=mib))


async def test_what_is_not_given_stays_and_null_lifts_a_limit(world: World) -> None:
    first = container(resources=limits(mem_limit_mib=64, pids_limit=10))
    await world.pods.run(pod(containers=[first]), world.call())
    status = await world.pods.update_container(
        "p1", "c1", limits(mem_limit_mib=None, cpu_shares=2), world.call()
    )
    assert status.resources == limits(pids_limit=10, cpu_shares=2) == in_guest(world)
    again = await world.pods.update_container("p1", "c1", limits(cpu_shares=2), world.call())
    assert again == status
    assert (await world.kinds()).count("container.updated") == 1
    with pytest.raises(NotFoundError):
        await world.pods.update_container("p1", "c9", limits(pids_limit=1), world.call())


async def test_limits_hold_over_restarts_of_everything(world: World) -> None:
    await world.pods.run(pod(), world.call())
    await world.pods.update_container("p1", "c1", limits(pids_limit=7), world.call())
    await world.pods.stop_container("p1", "c1", 0, world.call())
    await world.pods.start_container("p1", "c1", world.call())
    assert in_guest(world).pids_limit == 7
    await world.restart()
    await world.pods.recover()
    await world.pods.stop("p1", 0, world.call())
    # Where nothing runs the limits are those of the next start; and the same spec still makes the same pod.
    await world.pods.update_container("p1", "c1", limits(pids_limit=8), world.call())
    await world.pods.create(pod(), world.call())
    await world.pods.start("p1", world.call())
    assert in_guest(world).pids_limit == 8 == world.pods.container_status("p1", "c1").resources.pids_limit


async def test_a_limit_below_what_is_in_use_or_a_paused_pod_is_refused(world: World) -> None:
    await world.pods.run(pod(), world.call())
    (machine,) = world.vms.alive
    guest = world.guests.by_vm_id[machine.spec.vm_id]
    guest.find("c1").execs = {object(), object()}  # type: ignore[arg-type]
    with pytest.raises(FailedPreconditionError, match="has 3 processes"):
        await world.pods.update_container("p1", "c1", limits(pids_limit=2), world.call())
    guest.find("c1").execs = set()
    assert world.pods.container_status("p1", "c1").resources == limits()
    await world.pods.pause("p1", world.call())
    with pytest.raises(FailedPreconditionError, match="resume it first"):
        await world.pods.update_container("p1", "c1", limits(pids_limit=2), world.call())


async def test_an_update_that_is_not_recorded_is_taken_back(world: World) -> None:
    await world.pods.run(pod(), world.call())
    world.plan.failing = ("commit",)
    with pytest.raises(StorageError):
        await world.pods.update_container("p1", "c1", limits(pids_limit=7), world.call())
    assert in_guest(world) == limits() == world.pods.container_status("p1", "c1").resources
    world.plan.failing = ()


async def test_a_pod_shrinks_frees_room_and_grows_again(world: World) -> None:
    world.settings = world.settings.model_copy(
        update={"capacity": CapacitySettings(mem_mib=768, reserved_mem_mib=0)}
    )
    await world.restart()
    await world.pods.run(own_memory(), world.call())
    with pytest.raises(ResourceExhaustedError):
        await world.pods.create(own_memory("p2"), world.call())
    status = await world.pods.resize("p1", 256, world.call())
    assert (status.mem_size_mib, status.resources.mem_size_mib) == (256, 512)
    await world.pods.create(own_memory("p2"), world.call())
    with pytest.raises(ResourceExhaustedError, match="256 short"):
        await world.pods.resize("p1", 512, world.call())
    assert world.pods.status("p1").mem_size_mib == 256 == world.vms.alive[0].mem_size_mib
    await world.pods.delete("p2", False, world.call())
    for _ in range(2):
        assert (await world.pods.resize("p1", 512, world.call())).mem_size_mib == 512
    assert (await world.kinds()).count("pod.resized") == 2


async def test_a_pod_keeps_its_size_when_it_starts_again(world: World) -> None:
    await world.pods.run(own_memory(), world.call())
    await world.pods.resize("p1", 256, world.call())
    await world.pods.stop("p1", 0, world.call())
    with pytest.raises(FailedPreconditionError, match="Pod p1 is stopped"):
        await world.pods.resize("p1", 512, world.call())
    await world.pods.start("p1", world.call())
    assert [(m.spec.mem_size_mib, m.mem_size_mib) for m in world.vms.alive] == [(512, 256)]
    await world.restart()
    await world.pods.recover()
    assert world.pods.status("p1").mem_size_mib == 256


async def test_a_vm_that_may_share_its_memory_is_not_resized(world: World) -> None:
    await world.pods.run(pod(), world.call())
    with pytest.raises(FailedPreconditionError, match=r"shares its memory with a template.*'never'"):
        await world.pods.resize("p1", 128, world.call())
    assert not world.vms.alive[0].spec.balloon
    assert world.plan.calls["vm.set_memory"] == 0


async def test_more_than_the_vm_was_started_with_is_refused(world: World) -> None:
    await world.pods.run(own_memory(), world.call())
    with pytest.raises(InvalidArgumentError, match="at most 512"):
        await world.pods.resize("p1", 513, world.call())


async def test_a_guest_that_cannot_spare_so_much_is_not_asked(world: World) -> None:
    await world.pods.run(own_memory(), world.call())
    (machine,) = world.vms.alive
    world.guests.by_vm_id[machine.spec.vm_id].available_bytes = 100 << 20
    with pytest.raises(FailedPreconditionError, match="can spare 84 MiB now, not 256"):
        await world.pods.resize("p1", 256, world.call())
    assert world.plan.calls["vm.set_memory"] == 0
    assert (await world.pods.resize("p1", 428, world.call())).mem_size_mib == 428


@pytest.mark.parametrize("wanted", [256, 512])
async def test_what_fails_leaves_the_size_that_was(world: World, wanted: int) -> None:
    await world.pods.run(own_memory(), world.call())
    await world.pods.resize("p1", 384, world.call())
    world.plan.rules = (*world.plan.rules, *FaultPlan.parse("vm.set_memory:2=fail").rules)
    with pytest.raises((HypervisorError, AgentError)):
        await world.pods.resize("p1", wanted, world.call())
    assert world.pods.status("p1").mem_size_mib == 384 == world.vms.alive[0].mem_size_mib
    assert world.pods.status("p1").state is PodState.RUNNING
    assert (await world.kinds()).count("pod.resized") == 1
