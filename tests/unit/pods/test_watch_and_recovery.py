"""What happens without a command: VMs and sessions end, nodes restart."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from tests.unit.pods.world import World, container, pod
from vcnode.drivers.base import ContainerExited
from vcnode.errors import HypervisorError, StorageError
from vcnode.models.commands import ExecOptions
from vcnode.models.pod import Cmd, PodState
from vcnode.pods import watch

TRUE = ExecOptions(cmd=Cmd(args=("true",)))


def vm_id(world: World) -> str:
    (machine,) = world.vms.alive
    return machine.spec.vm_id


def lose_session(world: World, reason: str = "Garbage came.") -> None:
    for session in list(world.agent._sessions.values()):
        session.lose(reason)


async def test_a_vm_that_dies_fails_its_pod_at_once_and_frees_everything(world: World) -> None:
    await world.pods.run(pod(), world.call())
    world.vms.die(vm_id(world), "It was killed by the OOM killer.")
    event = await world.until_event("pod.failed")
    assert event.data["reason"] == "It was killed by the OOM killer."
    assert event.commandid is None
    while world.pods.busy:  # noqa: ASYNC110 -- bounded by the test's limit
        await asyncio.sleep(0)
    status = world.pods.status("p1")
    assert (status.state, status.leftovers, status.hypervisor) == (PodState.FAILED, (), None)
    assert status.containers[0].state == "stopped"
    assert world.leaks == []
    assert (await world.pods.start("p1", world.call())).state is PodState.RUNNING


async def test_the_death_of_a_vm_ends_the_command_that_holds_the_pod_with_the_reason(tmp_path) -> None:
    world = await World(tmp_path, "agent.start_container:2=hang").start()
    await world.pods.run(pod(), world.call())
    await world.pods.create_container("p1", container("c2"), world.call())
    task = asyncio.ensure_future(world.pods.start_container("p1", "c2", world.call("container.start")))
    while world.plan.calls["agent.start_container"] < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    world.vms.die(vm_id(world), "It was killed.")
    with pytest.raises(HypervisorError, match="It was killed"):
        await task
    await world.until_event("pod.failed")
    await world.close()


async def test_what_could_not_be_freed_after_a_death_is_listed_and_delete_tries_again(tmp_path) -> None:
    world = await World(tmp_path, "storage.remove_vm_dir:1=fail").start()
    await world.pods.run(pod(), world.call())
    world.vms.die(vm_id(world))
    await world.until_event("pod.failed", 2)
    while world.pods.busy:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert len(world.pods.status("p1").leftovers) == 1
    with pytest.raises(Exception, match="left something"):
        await world.pods.start("p1", world.call())
    await world.pods.delete("p1", False, world.call())
    assert world.leaks == []
    await world.close()


async def test_a_lost_session_is_restored_and_exits_meanwhile_are_learnt(world: World) -> None:
    await world.pods.run(pod(containers=[container("c1"), container("c2")]), world.call())
    (guest,) = world.guests.by_vm_id.values()
    lose_session(world)
    guest.signal("c2", 9, everyone=False)
    await world.until_event("pod.session_restored")
    assert world.observed.sessions_lost == 1
    status = world.pods.status("p1")
    assert [(c.state, c.exit_code) for c in status.containers] == [("running", None), ("stopped", 137)]
    assert (await world.pods.exec("p1", "c1", TRUE, world.call())).exit_code == 0
    kinds = await world.kinds()
    assert kinds[-3:] == ["pod.session_lost", "container.exited", "pod.session_restored"]
    assert (await world.until_event("pod.session_lost")).data["reason"] == "Garbage came."


async def test_a_session_that_cannot_be_restored_costs_the_pod_its_vm(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(watch, "RECONNECT_S", 0.05)
    monkeypatch.setattr(watch, "RECONNECT_PAUSE_S", 0.01)
    world = await World(tmp_path, "agent.connect:2-=fail").start()
    await world.pods.run(pod(), world.call())
    lose_session(world)
    event = await world.until_event("pod.failed")
    assert event.data["reason"] == "The session with the guest was lost for good: Garbage came."
    while world.pods.busy:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert world.leaks == []
    await world.close()


async def test_a_guest_that_loses_its_session_again_and_again_is_given_up(world, monkeypatch) -> None:
    monkeypatch.setattr(watch, "VM_END_GRACE_S", 0.001)
    await world.pods.run(pod(), world.call())
    for count in range(1, watch.MAX_LOSSES):
        lose_session(world)
        await world.until_event("pod.session_restored", count)
    lose_session(world)
    event = await world.until_event("pod.failed")
    assert "lost 5 times" in event.data["reason"]


async def test_a_session_lost_during_a_start_fails_the_start(tmp_path) -> None:
    world = await World(tmp_path, "agent.configure:1=hang").start()
    await world.pods.create(pod(), world.call())
    task = asyncio.ensure_future(world.pods.start("p1", world.call("pod.start")))
    while not world.plan.calls["agent.configure"]:  # noqa: ASYNC110
        await asyncio.sleep(0)
    lose_session(world)
    with pytest.raises(Exception, match="lost during its start"):
        await task
    assert world.pods.status("p1").state is PodState.FAILED
    assert world.leaks == []
    await world.close()


async def test_exits_that_a_hostile_guest_makes_up_cost_no_disk_write(world: World) -> None:
    await world.pods.run(pod(), world.call())
    commits = world.plan.log.count("commit")
    (session,) = world.agent._sessions.values()
    for n in range(50):
        session._on_event(ContainerExited(f"x{n}", 0, oom_killed=False))
    await asyncio.sleep(0.01)
    assert world.plan.log.count("commit") == commits
    assert world.pods.status("p1").containers[0].state == "running"


async def test_an_out_of_memory_kill_is_told(world: World) -> None:
    await world.pods.run(pod(), world.call())
    (session,) = world.agent._sessions.values()
    session._on_event(ContainerExited("c1", 137, oom_killed=True))
    event = await world.until_event("container.exited")
    assert event.data["oom_killed"] is True
    assert "memory" in event.data["reason"]


# ---- restarts ----------------------------------------------------------------------------------------


async def test_pods_run_on_while_the_node_is_away_and_are_adopted(world: World) -> None:
    await world.pods.run(pod(containers=[container("c1"), container("c2")]), world.call())
    before = vm_id(world)
    await world.close()
    (guest,) = world.guests.by_vm_id.values()
    guest.signal("c2", 15, everyone=False)
    await world.start()
    found = await world.pods.recover()
    assert (found.adopted, found.failed, found.undone) == (["p1"], [], [])
    assert vm_id(world) == before
    status = world.pods.status("p1")
    assert [(c.state, c.exit_code) for c in status.containers] == [("running", None), ("stopped", 143)]
    assert (await world.pods.exec("p1", "c1", TRUE, world.call())).exit_code == 0
    event = (await world.events())[-1]
    assert event.kind == "node.recovered"
    nothing: dict[str, list[str]] = {"failed": [], "undone": [], "restored": [], "reaped": []}
    assert event.data == {"node": "n1", "adopted": ["p1"], **nothing}
    assert event.epoch == 2
    await world.pods.stop("p1", None, world.call("pod.stop"))
    assert world.leaks == []


async def test_a_vm_that_ended_meanwhile_is_reported_and_freed(world: World) -> None:
    await world.pods.run(pod(), world.call())
    await world.close()
    world.vms.die(world.vms.alive[0].spec.vm_id)
    await world.start()
    assert (await world.pods.recover()).failed == ["p1"]
    status = world.pods.status("p1")
    assert (status.state, status.reason) == (
        PodState.FAILED,
        "The VM ended while the node agent was away.",
    )
    assert world.leaks == []


@pytest.mark.parametrize("fault", ["hypervisor.recover:1=fail", "agent.connect:1=fail"])
async def test_a_vm_that_cannot_be_taken_over_is_killed(world: World, fault: str) -> None:
    await world.pods.run(pod(), world.call())
    await world.restart(fault)
    assert (await world.pods.recover()).failed == ["p1"]
    assert "could not be taken over" in (world.pods.status("p1").reason or "")
    assert world.leaks == []


async def test_a_vm_that_cannot_be_taken_over_for_want_of_descriptors_is_killed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def short(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    await world.pods.run(pod(), world.call())
    await world.restart()
    monkeypatch.setattr(world.hypervisor, "recover", short)
    assert (await world.pods.recover()).failed == ["p1"]
    assert world.pods.status("p1").state is PodState.FAILED
    assert world.leaks == []


@pytest.mark.parametrize(
    ("verb", "reached", "state"),
    [("start", "hypervisor.launch", PodState.FAILED), ("stop", "vm.stop", PodState.STOPPED)],
)
async def test_a_half_done_command_is_mended_when_the_disk_takes_it(
    world: World, monkeypatch: pytest.MonkeyPatch, verb: str, reached: str, state: PodState
) -> None:
    """A commit that failed once left the pod half-way, with nothing of it there, until it was stopped."""
    monkeypatch.setattr(watch, "SAVE_PAUSES_S", (0.0,))
    await (world.pods.create if verb == "start" else world.pods.run)(pod(), world.call())
    seen = len(world.plan.log)
    act = (
        world.pods.start("p1", world.call()) if verb == "start" else world.pods.stop("p1", None, world.call())
    )
    task = asyncio.ensure_future(act)
    while reached not in world.plan.log[seen:]:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await world.crash()
    await asyncio.wait([task])
    await world.start()
    failed = False

    def fail_once() -> None:
        nonlocal failed
        failed = True
        raise StorageError("Not now.")

    reach = world.plan.reach

    def watched(what: str) -> None:
        if what == "commit" and not failed:
            world.plan.at[len(world.plan.log)] = fail_once
        reach(what)

    monkeypatch.setattr(world.plan, "reach", watched)
    assert (await world.pods.recover()).undone == ["p1"]
    assert failed
    assert world.pods.status("p1").state is state
    assert world.leaks == []


async def test_an_adopted_pod_is_watched(world: World) -> None:
    await world.pods.run(pod(), world.call())
    await world.restart()
    await world.pods.recover()
    world.vms.die(vm_id(world), "Killed later.")
    assert (await world.until_event("pod.failed")).data["reason"] == "Killed later."


async def test_recovery_of_one_pod_does_not_keep_the_others_down(world: World) -> None:
    for name in ("a", "b", "c"):
        await world.pods.run(pod(name), world.call())
    await world.restart("hypervisor.recover:1=fail")
    found = await world.pods.recover()
    assert len(found.adopted) == 2
    assert len(found.failed) == 1


async def test_leftovers_are_freed_by_a_recovery_when_that_works_then(tmp_path) -> None:
    world = await World(tmp_path, "storage.remove_vm_dir:1=fail").start()
    await world.pods.run(pod(), world.call())
    world.vms.die(vm_id(world))
    await world.until_event("pod.failed", 2)
    await world.restart()
    assert (await world.pods.recover()).undone == ["p1"]
    assert world.leaks == []
    assert world.pods.status("p1").leftovers == ()
    await world.close()


async def test_a_node_without_pods_recovers_nothing(world: World) -> None:
    found = await world.pods.recover()
    assert (found.adopted, found.failed, found.undone) == ([], [], [])
    assert await world.kinds() == ["node.recovered"]
