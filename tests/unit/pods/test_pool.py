"""Spare VMs: made in the background, taken by pods, given up for them, and never a reason to fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.unit.pods.world import World, pod
from vcnode.models.pod import PodState, Resources
from vcnode.pods import pool as pool_module
from vcnode.pods.host import HostMemory
from vcnode.settings import PoolSettings

LIMIT_S = 10.0
ONE = (PoolSettings(spares=1),)
TWO = (PoolSettings(spares=2),)

Make = Callable[..., World]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be made is tried again at once."""
    monkeypatch.setattr(pool_module, "PAUSES_S", (0.0,))


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[World] = []

    def make(faults: str = "", **settings: object) -> World:
        made.append(World(tmp_path, faults, templates=True, **settings))
        return made[-1]

    yield make
    for world in made:
        await world.close()
        assert not [leak for leak in world.leaks if leak.split()[-1] in world.pods.pool.vm_ids]


async def until_ready(world: World, count: int) -> None:
    """Wait until so many spares wait."""
    async with asyncio.timeout(LIMIT_S):
        while sum(status.ready for status in world.pods.pool.statuses()) != count:
            await world.pods.pool.changed.wait()
            world.pods.pool.changed.clear()


async def full(world: World, count: int) -> World:
    """The node with its pool filled."""
    await world.start()
    world.pods.pool.start()
    await until_ready(world, count)
    return world


def spare_ids(world: World) -> set[str]:
    return {m.spec.vm_id for m in world.vms.alive if not m.running}


async def test_spares_wait_paused_and_have_answered(make: Make):
    world = await full(make(pool=TWO), 2)
    assert len(spare_ids(world)) == 2
    assert world.plan.log.count("agent.connect") == 3  # the template's own, and one each


async def test_a_pod_takes_a_spare_and_the_pool_refills(make: Make):
    world = await full(make(pool=ONE), 1)
    (spare,) = spare_ids(world)
    status = await world.pods.run(pod("p1"), world.call("pod.run"))
    assert status.state is PodState.RUNNING
    assert status.hypervisor is not None
    assert status.hypervisor.vm_id == spare
    assert {"queue", "pool", "configure", "containers", "total"} <= set(status.phases_ms)
    assert not {"qemu", "boot", "agent"} & set(status.phases_ms)
    assert world.guests.by_vm_id[spare].config is not None
    await until_ready(world, 1)
    assert spare not in spare_ids(world)
    assert world.observed.spares_taken == [True]


async def test_pods_that_the_pool_is_not_for_leave_it_alone(make: Make):
    world = await full(make(pool=ONE), 1)
    spares = spare_ids(world)
    await world.pods.run(pod("p1", template="never"), world.call("pod.run"))
    await world.pods.run(pod("p2", resources=Resources(mem_size_mib=512)), world.call("pod.run"))
    assert spare_ids(world) == spares


async def test_a_pod_that_comes_to_an_empty_pool_is_cloned(make: Make):
    world = await full(make(pool=ONE), 1)
    world.memory = HostMemory(total_mib=8192, available_mib=100)  # nothing is refilled
    await world.pods.run(pod("p1"), world.call("pod.run"))
    status = await world.pods.run(pod("p2"), world.call("pod.run"))
    assert "qemu" in status.phases_ms
    assert world.observed.spares_taken == [True, False]


async def test_a_spare_that_dies_while_it_waits_is_replaced(make: Make):
    world = await full(make(pool=ONE), 1)
    (spare,) = spare_ids(world)
    world.vms.die(spare)
    await until_ready(world, 0)
    await until_ready(world, 1)
    assert spare_ids(world)
    assert spare not in spare_ids(world)
    assert spare not in world.host.vm_dirs
    assert world.observed.spares_lost == 1


@pytest.mark.parametrize("fault", ["vm.resume:1=fail", "agent.ping:1=fail", "agent.ping:1=hang"])
async def test_a_spare_that_does_not_answer_when_taken_costs_a_clone(
    make: Make, fault: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pool_module, "CLAIM_LIMIT_S", 0.05)
    world = await full(make(fault, pool=ONE), 1)
    status = await world.pods.run(pod("p1"), world.call("pod.run"))
    assert status.state is PodState.RUNNING
    assert "qemu" in status.phases_ms
    assert world.observed.spares_lost == 1
    await world.pods.delete("p1", True, world.call("pod.delete"))
    await until_ready(world, 1)
    assert len(world.vms.alive) == len(world.host.vm_dirs) == 1


@pytest.mark.parametrize(
    "step", ["storage.make_vm_dir", "hypervisor.launch", "hypervisor.clone", "agent.connect", "vm.pause"]
)
async def test_a_spare_that_cannot_be_made_leaves_nothing_and_is_tried_again(make: Make, step: str):
    which = 2 if step in ("storage.make_vm_dir", "hypervisor.launch", "agent.connect") else 1
    world = await full(make(f"{step}:{which}=fail", pool=ONE), 1)
    assert len(world.vms.alive) == len(world.host.vm_dirs) == 1
    assert world.pods.pool.vm_ids == spare_ids(world)


async def test_spares_give_way_when_a_pod_needs_their_memory(make: Make):
    world = await full(make(pool=TWO), 2)
    world.memory = HostMemory(total_mib=8192, available_mib=100)
    await world.pods.pool.make_room(512)
    assert world.vms.alive == []
    assert world.host.vm_dirs == set()


async def test_an_audit_takes_spares_for_the_nodes_own(make: Make):
    world = await full(make(pool=TWO), 2)
    assert (await world.pods.audit(repair=True)).orphan_count == 0
    assert len(spare_ids(world)) == 2


async def test_spares_end_with_a_node_that_ends_in_good_order(make: Make):
    world = await full(make(pool=TWO), 2)
    await world.pods.close()
    assert world.leaks == []


async def test_spares_that_a_killed_node_left_are_reaped(make: Make):
    world = await full(make(pool=TWO), 2)
    left = spare_ids(world)
    await world.crash()
    await world.start()
    assert spare_ids(world) == left
    await world.pods.recover()
    assert world.leaks == []


async def test_nothing_is_made_while_a_pod_starts(make: Make):
    world = make("agent.configure:1=hang", pool=ONE)
    await world.start()
    start = asyncio.ensure_future(world.pods.run(pod("p1"), world.call("pod.run")))
    await world.until_event("pod.starting")
    world.pods.pool.start()
    for _ in range(50):
        await asyncio.sleep(0)
    assert world.pods.pool.vm_ids == set()
    start.cancel()
    await asyncio.wait([start])
    await until_ready(world, 1)
