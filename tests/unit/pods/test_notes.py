"""Notes of running pods: a node that has lost its database finds its pods by them."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from tests.unit.pods.world import World, container, pod
from vcnode.models.commands import ExecOptions
from vcnode.models.pod import Cmd, PodState
from vcnode.models.records import PodNote
from vcnode.pods.notes import parse, unknown

TRUE = ExecOptions(cmd=Cmd(args=("true",)))


async def lose_database(world: World, copy: Path | None = None) -> None:
    """Start the node on no database, or on an older copy."""
    await world.close()
    for file in world.path.glob("node.db*"):
        file.unlink()
    if copy is not None:
        shutil.copy(copy, world.path / "node.db")
    await world.start("")


async def test_a_node_on_an_empty_database_goes_on_with_its_running_pods(world: World) -> None:
    await world.images.import_("busybox", "/roots/image", world.call())
    await world.pods.run(pod("a", [container("c1"), container("c2", image="busybox")]), world.call())
    await world.pods.run(pod("b"), world.call())
    before = {p.pod_id: p.created_at for p in world.pods.list({}, ()).pods}
    machines = {m.spec.vm_id for m in world.vms.alive}

    await lose_database(world)
    found = await world.pods.recover()

    assert sorted(found.restored) == sorted(found.adopted) == ["a", "b"]
    assert {m.spec.vm_id for m in world.vms.alive} == machines
    assert {p.pod_id: p.created_at for p in world.pods.list({}, ()).pods} == before
    for each in ("a", "b"):
        assert world.pods.status(each).state is PodState.RUNNING
        assert (await world.pods.exec(each, "c1", TRUE, world.call())).exit_code == 0
    assert (await world.until_event("node.recovered")).data["restored"] == ["a", "b"]
    audit = await world.pods.audit(repair=True)
    assert audit.orphan_count == 0
    for each in ("a", "b"):
        await world.pods.delete(each, True, world.call())
    assert world.leaks == []


async def test_an_older_database_learns_what_happened_since(world: World) -> None:
    await world.pods.run(pod("kept"), world.call())
    await world.pods.run(pod("anew"), world.call())
    await world.pods.create(pod("started"), world.call())
    await world.pods.run(pod("gone"), world.call())
    await world.close()
    copy = world.path / "copy"
    shutil.copy(world.path / "node.db", copy)
    await world.start("")
    await world.pods.recover()
    await world.pods.start("started", world.call())
    await world.pods.delete("gone", True, world.call())
    await world.pods.delete("anew", True, world.call())
    await world.pods.run(pod("anew"), world.call())

    await lose_database(world, copy)
    found = await world.pods.recover()

    assert sorted(found.restored) == ["anew", "started"]
    assert sorted(found.adopted) == ["anew", "kept", "started"]
    assert world.pods.status("gone").state is PodState.FAILED
    assert len(world.vms.alive) == 3
    for status in world.pods.list({}, ()).pods:
        await world.pods.delete(status.pod_id, True, world.call())
    assert world.leaks == []


async def test_a_pod_that_was_starting_when_database_and_node_were_lost_is_undone(tmp_path: Path) -> None:
    world = await World(tmp_path, "agent.configure:1=hang").start()
    await world.pods.create(pod(), world.call())
    task = world.tasks.spawn(_start(world), name="start")
    while not world.plan.calls["agent.configure"]:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await world.crash()
    assert task.done()
    for file in world.path.glob("node.db*"):
        file.unlink()
    await world.start("")
    found = await world.pods.recover()
    assert (found.restored, found.undone) == (("p1",), ["p1"])
    assert world.pods.status("p1").state is PodState.FAILED
    assert world.leaks == []
    await world.close()


async def test_the_database_is_the_truth_as_long_as_it_is_newer(world: World) -> None:
    await world.pods.run(pod(), world.call())
    (note,) = world.host.notes.values()
    record = PodNote.model_validate_json(note).record
    assert record.state is PodState.RUNNING
    newer = record.model_copy(update={"revision": record.revision + 1})
    made_anew = record.model_copy(update={"created_at": world.clock(), "revision": 1})
    assert unknown([record], {"p1": record}) == []
    assert unknown([record], {"p1": newer}) == []
    assert unknown([record], {"p1": made_anew}) == []
    assert unknown([record, made_anew, newer], {"p1": record}) == [made_anew]
    assert unknown([record, newer], {}) == [newer]


async def test_what_is_no_note_of_this_node_and_vm_is_left_out(world: World) -> None:
    await world.pods.run(pod(), world.call())
    ((vm_id, note),) = world.host.notes.items()
    assert [r.pod_id for r in parse({vm_id: note}, "n1")] == ["p1"]
    assert parse({vm_id: note}, "n2") == []
    assert parse({"vm-other": note}, "n1") == []
    assert parse({vm_id: note[:-10]}, "n1") == []
    assert parse({vm_id: ""}, "n1") == []


async def test_a_note_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    world = await World(tmp_path, "storage.write_note:*=fail").start()
    assert (await world.pods.run(pod(), world.call())).state is PodState.RUNNING
    await world.pods.delete("p1", True, world.call())
    assert world.leaks == []
    await world.close()


async def _start(world: World) -> None:
    await world.pods.start("p1", world.call("pod.start"))
