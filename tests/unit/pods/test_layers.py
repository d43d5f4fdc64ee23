"""Writable disks of containers: whose they are, how long they stay, and how much of them there may be."""

from __future__ import annotations

import json

import pytest

from tests.unit.pods.world import World, container, pod
from vcnode.errors import CleanupError, NodeError, ResourceExhaustedError, StorageError
from vcnode.models.pod import ContainerSpec
from vcnode.settings import CapacitySettings


def on_disk(container_id: str = "c1", **fields: object) -> ContainerSpec:
    return container(container_id, image="app", writable="disk", **fields)


async def with_image(world: World) -> World:
    await world.images.import_("app", "/roots/app", world.call())
    return world


def disks_of(world: World, pod_id: str = "p1") -> dict[str, bool]:
    """The disks that the pod's VM has, and whether they are read-only."""
    record = world.store.pods[pod_id]
    assert record.vm is not None
    return {name: disk.read_only for name, disk in world.vms.machines[record.vm.vm_id].disks.items()}


async def test_a_disk_is_made_at_the_first_start_and_goes_with_the_pod(world: World) -> None:
    await with_image(world)
    created = await world.pods.create(pod(containers=[on_disk(disk_size_mib=256)]), world.call())
    assert created.containers[0].disk_size_mib == 256
    assert world.host.layers == {}
    await world.pods.start("p1", world.call())
    [(layer_id, size_mib)] = world.host.layers.items()
    assert size_mib == 256
    disks = disks_of(world)
    assert disks.pop(layer_id) is False
    assert list(disks.values()) == [True]
    [guest] = world.guests.by_vm_id.values()
    assert guest.containers["c1"].spec.root.layer_disk_id == layer_id

    await world.pods.stop("p1", 0, world.call())
    assert list(world.host.layers) == [layer_id]
    await world.pods.start("p1", world.call())
    assert list(world.host.layers) == [layer_id]
    await world.pods.delete("p1", True, world.call())
    assert world.host.empty


async def test_containers_have_disks_of_their_own_and_take_them_along(world: World) -> None:
    await with_image(world)
    await world.pods.run(pod(containers=[on_disk("c1"), on_disk("c2")]), world.call())
    first, second = (c.layer_id for c in world.store.pods["p1"].containers)
    assert sorted(world.host.layers) == sorted([first, second])
    await world.pods.delete_container("p1", "c2", True, world.call())
    assert list(world.host.layers) == [first]
    assert second not in disks_of(world)
    assert len(disks_of(world)) == 2  # the image is still in use


async def test_a_container_in_memory_has_none(world: World) -> None:
    await with_image(world)
    status = await world.pods.run(pod(containers=[container(image="app")]), world.call())
    assert status.containers[0].disk_size_mib is None
    assert world.host.layers == {}


@pytest.mark.parametrize("operation", ["storage.make_layer", "vm.attach_disk", "agent.create_container"])
async def test_a_run_that_fails_leaves_no_disk(world: World, operation: str) -> None:
    await with_image(world)
    world.plan.failing = (operation,)
    with pytest.raises(NodeError):
        await world.pods.run(pod(containers=[on_disk()]), world.call())
    assert world.host.empty
    assert "p1" not in world.store.pods


async def test_a_start_that_fails_keeps_the_disk_for_the_next_one(world: World) -> None:
    await with_image(world)
    await world.pods.create(pod(containers=[on_disk()]), world.call())
    world.plan.failing = ("agent.create_container",)
    with pytest.raises(StorageError):
        await world.pods.start("p1", world.call())
    kept = dict(world.host.layers)
    world.plan.failing = ()
    await world.pods.start("p1", world.call())
    assert world.host.layers == kept
    assert len(kept) == 1


async def test_a_disk_that_cannot_be_deleted_keeps_its_pod(world: World) -> None:
    await with_image(world)
    await world.pods.run(pod(containers=[on_disk()]), world.call())
    world.plan.failing = ("storage.remove_layer",)
    with pytest.raises(CleanupError, match="disk"):
        await world.pods.delete("p1", True, world.call())
    assert world.pods.status("p1").state == "stopped"
    world.plan.failing = ()
    await world.pods.delete("p1", False, world.call())
    assert world.host.empty


async def test_an_audit_knows_whose_disks_are_and_removes_those_of_nobody(world: World) -> None:
    await with_image(world)
    await world.pods.create(pod(containers=[on_disk()]), world.call())
    await world.pods.start("p1", world.call())
    await world.pods.stop("p1", 0, world.call())
    [layer_id] = world.host.layers
    orphan = layer_id[:-1] + ("0" if layer_id[-1] != "0" else "1")
    world.host.layers |= {orphan: 64, "vm-other": 64}
    audit = await world.pods.audit(repair=True)
    found = {h.vm_id: (h.pod_id, h.orphan, h.freed) for h in audit.holdings if h.kind == "disk"}
    assert found == {layer_id: ("p1", False, False), orphan: (None, True, True)}
    assert sorted(world.host.layers) == sorted([layer_id, "vm-other"])


async def test_a_restarted_node_finds_the_disk_again(world: World) -> None:
    await with_image(world)
    await world.pods.run(pod(containers=[on_disk()]), world.call())
    kept = dict(world.host.layers)
    await world.restart()
    await world.pods.recover()
    assert world.host.layers == kept
    await world.pods.delete("p1", True, world.call())
    assert world.host.empty


async def test_all_disks_together_are_bounded(tmp_path) -> None:
    world = await World(tmp_path, capacity=CapacitySettings(disk_mib=1024)).start()
    await with_image(world)
    await world.pods.create(pod("p1", [on_disk(disk_size_mib=512)]), world.call())
    with pytest.raises(ResourceExhaustedError, match=r"needs 1024 MiB of disk \(512 left, 512 short\)"):
        await world.pods.create(pod("p2", [on_disk()]), world.call())
    with pytest.raises(ResourceExhaustedError):
        await world.pods.create_container("p1", on_disk("c2"), world.call())
    await world.pods.create_container("p1", on_disk("c2", disk_size_mib=512), world.call())
    await world.pods.create(pod("p3", [container(image="app")]), world.call())
    await world.pods.delete("p1", False, world.call())
    await world.pods.create(pod("p2", [on_disk()]), world.call())
    await world.close()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rootfs": "/roots/x", "writable": "disk", "cmd": {"args": ["x"]}}, "'writable' is for an 'image'"),
        ({"image": "app", "disk_size_mib": 1024}, "needs 'writable' to be 'disk'"),
        ({"image": "app", "writable": "disk", "disk_size_mib": 1000}, "power of two"),
        ({"image": "app", "writable": "disk", "disk_size_mib": 32}, "greater than or equal to 64"),
        ({"image": "app", "writable": "tape"}, "'memory' or 'disk'"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ContainerSpec.model_validate_json(json.dumps(fields))
