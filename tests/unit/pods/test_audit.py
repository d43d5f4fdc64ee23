"""The audit: everything on the host has an owner, or goes; nothing of anyone else is touched."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.pods.world import World, container, pod
from vcnode.models.pod import PodState
from vcnode.models.vm import VmSpec
from vcnode.pods.marks import mark_of, new_vm_id


@pytest.fixture
async def world(tmp_path: Path) -> World:
    world = await World(tmp_path).start()
    await world.pods.recover()
    return world


async def strand(world: World, vm_id: str) -> None:
    """Put a VM with all that it needs on the host, of which no record knows."""
    directory = await world.storage.make_vm_dir(vm_id)
    await world.storage.share(vm_id, "c1", "/roots/busybox")
    await world.network.prepare(vm_id, 1, timeout_s=1)
    spec = VmSpec(
        vm_id=vm_id,
        uuid=f"uuid-of-{vm_id}",
        vcpu_count=1,
        mem_size_mib=128,
        directory=str(directory),
        shared_dir=str(directory / "shared"),
    )
    await world.hypervisor.launch(spec, timeout_s=1)


async def test_what_a_pod_holds_is_listed_with_the_pod(world: World) -> None:
    await world.pods.run(pod("p1"), world.call())
    found = await world.pods.audit(repair=True)
    assert sorted(h.kind for h in found.holdings) == ["directory", "link", "mount", "process"]
    assert {h.pod_id for h in found.holdings} == {"p1"}
    assert (found.orphan_count, found.freed_count, found.problems) == (0, 0, ())
    assert world.pods.status("p1").state is PodState.RUNNING
    await world.close()


async def test_an_orphan_is_listed_and_only_a_repair_frees_it(world: World) -> None:
    await world.pods.run(pod("p1"), world.call())
    orphan = new_vm_id(world.settings)
    await strand(world, orphan)

    found = await world.pods.audit(repair=False)
    assert (found.orphan_count, found.freed_count) == (4, 0)
    assert {h.vm_id for h in found.holdings if h.orphan} == {orphan}
    assert any(orphan in leak for leak in world.leaks)
    assert world.observed.audits[-1][1] == {"directory": 1, "link": 1, "mount": 1, "process": 1}

    found = await world.pods.audit(repair=True)
    assert (found.orphan_count, found.freed_count) == (4, 4)
    assert not any(orphan in leak for leak in world.leaks)
    assert world.observed.audits[-1][1:] == ({}, 4)
    assert (await world.pods.audit(repair=True)).orphan_count == 0
    assert world.pods.status("p1").state is PodState.RUNNING
    await world.close()


async def test_what_lacks_the_mark_is_neither_listed_nor_touched(world: World) -> None:
    await strand(world, "vm-of-somebody-else")
    before = world.leaks
    assert (await world.pods.audit(repair=True)).holdings == ()
    assert world.leaks == before
    await world.close()


async def test_a_start_reaps_what_the_last_life_has_stranded(world: World) -> None:
    await strand(world, new_vm_id(world.settings))
    await world.crash()
    await world.start()
    await world.pods.recover()
    assert world.leaks == []
    recovered = [e for e in await world.events() if e.kind == "node.recovered"][-1]
    reaped = recovered.data["reaped"]
    assert isinstance(reaped, list)
    assert len(reaped) == 4
    await world.close()


@pytest.mark.parametrize("step", ["hypervisor.launch", "vm", "agent.connect", "hypervisor.save_template"])
async def test_a_template_whose_making_died_with_the_node_leaves_nothing(world: World, step: str) -> None:
    world.hypervisor._templates = True  # as a node whose hypervisor offers them
    await world.pods.run(pod("p1"), world.call())
    await made(world)
    world.vms.templates.clear()
    await world.pods.run(pod("p2", template="never"), world.call())
    original = world.plan.hit
    reached = asyncio.Event()

    async def hit(operation: str, *, vm_id: str | None = None) -> None:
        if operation == step:
            assert vm_id is None or vm_id in world.pods.templates.making
            assert (await world.pods.audit(repair=True)).orphan_count == 0
            reached.set()
            await asyncio.Event().wait()
        await original(operation, vm_id=vm_id)

    world.plan.hit = hit  # type: ignore[method-assign]
    await world.pods.stop("p1", 0, world.call())
    world.pods.templates.learn(world.store.pods["p1"])
    async with asyncio.timeout(10):
        await reached.wait()
    await world.crash()
    await world.start()
    await world.pods.recover()
    assert {h.pod_id for h in (await world.pods.audit(repair=False)).holdings} == {"p2"}
    assert len(world.vms.alive) == 1
    await world.close()


async def made(world: World) -> None:
    """Wait until no template is being made."""
    async with asyncio.timeout(10):
        while world.pods.templates.making or not world.vms.templates:  # noqa: ASYNC110 -- no event says so
            await asyncio.sleep(0)


async def test_what_cannot_be_freed_keeps_what_it_stands_on_and_is_freed_later(world: World) -> None:
    orphan = new_vm_id(world.settings)
    await strand(world, orphan)
    world.plan.failing = ("hypervisor.free",)
    found = await world.pods.audit(repair=True)
    assert (found.orphan_count, found.freed_count) == (4, 0)
    assert len(found.problems) == 1
    assert "process" in found.problems[0]
    assert f"directory {orphan}" in world.leaks
    world.plan.failing = ()
    assert (await world.pods.audit(repair=True)).freed_count == 4
    assert world.leaks == []
    await world.close()


async def test_a_driver_that_cannot_look_hides_nothing_else(world: World) -> None:
    orphan = new_vm_id(world.settings)
    await strand(world, orphan)
    world.plan.failing = ("network.held",)
    found = await world.pods.audit(repair=True)
    assert found.problems
    assert found.freed_count == 3
    assert world.leaks == [], "the network was removed by the VM's id alone"
    await world.close()


@pytest.mark.parametrize("operation", ["held", "free"])
async def test_no_error_of_a_driver_ends_the_audit(
    world: World, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is short of descriptors may say so in words of the system's."""
    orphan = new_vm_id(world.settings)
    await strand(world, orphan)

    async def short(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(world.hypervisor, operation, short)
        problems = (await world.pods.audit(repair=True)).problems
    assert len(problems) == 1
    assert "Too many open files" in problems[0]
    await world.pods.audit(repair=True)
    assert world.leaks == []
    await world.close()


async def test_a_pod_that_starts_during_the_audit_is_no_orphan(world: World) -> None:
    """The audit looks between any two steps of a start and of a stop."""
    found = []

    for verb in ("start", "stop"):
        if verb == "start":
            await world.pods.create(pod("p1"), world.call())
        original = world.plan.hit

        async def hit(operation: str, *, vm_id: str | None = None, original=original) -> None:
            world.plan.hit = original  # type: ignore[method-assign]
            found.append(await world.pods.audit(repair=True))
            await original(operation, vm_id=vm_id)
            world.plan.hit = hit  # type: ignore[method-assign]

        world.plan.hit = hit  # type: ignore[method-assign]
        if verb == "start":
            await world.pods.start("p1", world.call())
        else:
            await world.pods.stop("p1", 0, world.call())
        world.plan.hit = original  # type: ignore[method-assign]
    assert len(found) > 8
    assert [audit.orphan_count for audit in found] == [0] * len(found)
    await world.close()


def test_marks_tell_nodes_apart_and_stay(world_settings: tuple[World, World, World]) -> None:
    one, other_name, other_place = world_settings
    marks = {mark_of(w.settings) for w in (one, other_name, other_place)}
    assert len(marks) == 3
    assert mark_of(one.settings) == mark_of(one.settings)
    ids = {new_vm_id(one.settings) for _ in range(100)}
    assert len(ids) == 100
    assert all(vm_id.startswith(mark_of(one.settings)) and len(vm_id) == 15 for vm_id in ids)


@pytest.fixture
def world_settings(tmp_path: Path) -> tuple[World, World, World]:
    one, other_name, other_place = World(tmp_path), World(tmp_path), World(tmp_path / "other")
    other_name.settings = other_name.settings.model_copy(update={"node_name": "n2"})
    return one, other_name, other_place


async def test_images_and_disks_of_a_lost_database_are_orphans_and_those_in_use_are_not(
    world: World,
) -> None:
    await world.images.import_("old", "/roots/old", world.call())
    await world.images.import_("used", "/roots/used", world.call())
    spec = pod("p1", [container("c1", image="used", writable="disk")])
    await world.pods.run(spec, world.call())
    await world.pods.create(pod("p2", [container("c1", image="used", writable="disk")]), world.call())
    disk = world.store.pods["p2"].containers[0].layer_id
    assert disk is not None
    await world.storage.make_layer(disk, 64, timeout_s=1)
    await world.crash()
    (world.path / "node.db").unlink()
    await world.start()
    # What a lost database knew, before the start of the next life would remove it.
    await world.pods._notes.restore()
    found = await world.pods.audit(repair=False)
    orphans = {(h.kind, h.vm_id is None) for h in found.holdings if h.orphan}
    assert orphans == {("image", True), ("disk", False)}
    assert len(world.host.images) == 2
    assert (await world.pods.audit(repair=True)).freed_count == found.orphan_count
    assert len(world.host.images) == 1
    assert world.store.pods["p1"].containers[0].image_digest in world.host.images
    assert set(world.host.layers) == {world.store.pods["p1"].containers[0].layer_id}
    assert (await world.pods.audit(repair=True)).orphan_count == 0
    await world.close()


@pytest.mark.parametrize("when", ["before the look", "after the look"])
async def test_a_repair_takes_no_file_from_a_pull_that_runs(world: World, when: str) -> None:
    """The pull has its file, which no record names yet."""
    await world.storage.build_image("/roots/nobody", timeout_s=1)
    reached, go_on = asyncio.Event(), asyncio.Event()
    keep = world.images._keep

    async def waiting(*args: Any) -> None:
        reached.set()
        await go_on.wait()
        await keep(*args)

    world.images._keep = waiting  # type: ignore[method-assign]
    importing = asyncio.ensure_future(world.images.import_("new", "/roots/nobody", world.call()))
    if when == "before the look":
        await reached.wait()
        assert (await world.pods.audit(repair=True)).orphan_count == 0
    else:
        importing.cancel()
        await asyncio.wait([importing])
        look = world.images.held

        async def late(mark: str) -> Any:
            """The import begins between the audit's look and what it removes."""
            nonlocal importing
            found = await look(mark)
            if any(held.unclaimed for held in found) and not reached.is_set():
                world.images.held = look  # type: ignore[method-assign]
                found = await look(mark)
                importing = asyncio.ensure_future(world.images.import_("new", "/roots/nobody", world.call()))
                await reached.wait()
            return found

        world.images.held = late  # type: ignore[method-assign]
        await world.pods.audit(repair=True)
    go_on.set()
    status = await importing
    assert status.digest in world.host.images
    await world.close()
