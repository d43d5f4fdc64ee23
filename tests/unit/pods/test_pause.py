"""Paused pods: what they refuse, what they survive, and that record and VM always agree."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.pods.world import World, container, pod
from vcnode.errors import AgentError, FailedPreconditionError, HypervisorError, VcnodeError
from vcnode.models.commands import ExecOptions
from vcnode.models.pod import Cmd, PodState
from vcnode.pods import watch

TRUE = ExecOptions(cmd=Cmd(args=("true",)))


async def paused(world: World) -> None:
    await world.pods.run(pod(), world.call("pod.run"))
    await world.pods.pause("p1", world.call("pod.pause"))


def machine_runs(world: World) -> bool:
    (machine,) = world.vms.alive
    return machine.running


def lose_session(world: World) -> None:
    for session in list(world.agent._sessions.values()):
        session.lose("Garbage came.")


async def test_a_pod_is_paused_and_resumed_and_both_can_be_repeated(world: World) -> None:
    await world.pods.run(pod(), world.call())
    for _ in range(2):
        assert (await world.pods.pause("p1", world.call())).state is PodState.PAUSED
        assert not machine_runs(world)
    for _ in range(2):
        assert (await world.pods.resume("p1", world.call())).state is PodState.RUNNING
        assert machine_runs(world)
    assert (await world.kinds())[-2:] == ["pod.paused", "pod.resumed"]
    assert (await world.pods.exec("p1", "c1", TRUE, world.call())).exit_code == 0


@pytest.mark.parametrize("verb", ["pause", "resume"])
async def test_a_pod_that_does_not_run_can_be_neither_paused_nor_resumed(world: World, verb: str) -> None:
    await world.pods.create(pod(), world.call())
    with pytest.raises(FailedPreconditionError, match="Pod p1 is ready"):
        await getattr(world.pods, verb)("p1", world.call())


async def test_what_needs_the_guest_of_a_paused_pod_is_refused_with_what_to_do(world: World) -> None:
    await paused(world)
    pods = world.pods
    attempts = (
        pods.exec("p1", "c1", TRUE, world.call()),
        pods.exec("p1", None, TRUE, world.call()),
        pods.start_container("p1", "c1", world.call()),
        pods.stop_container("p1", "c1", None, world.call()),
        pods.kill_container("p1", "c1", 15, False, world.call()),
    )
    for attempt in attempts:
        with pytest.raises(FailedPreconditionError, match=r"is paused.*resume it first"):
            await attempt
    for attempt in (
        pods.create_container("p1", container("c2"), world.call()),
        pods.delete_container("p1", "c1", True, world.call()),
    ):
        with pytest.raises(FailedPreconditionError, match=r"is paused.*resume it first"):
            await attempt


@pytest.mark.parametrize("grace_s", [None, 0])
async def test_a_paused_pod_is_stopped_at_once(world: World, grace_s: float | None) -> None:
    await paused(world)
    stopped = await world.pods.stop("p1", grace_s, world.call())
    assert (stopped.pod.state, stopped.outcome) == (PodState.STOPPED, "forced")
    assert world.leaks == []


async def test_a_paused_pod_is_deleted_by_force_only(world: World) -> None:
    await paused(world)
    with pytest.raises(FailedPreconditionError):
        await world.pods.delete("p1", False, world.call())
    await world.pods.delete("p1", True, world.call())
    assert world.leaks == []


async def test_the_end_of_a_paused_vm_fails_its_pod(world: World) -> None:
    await paused(world)
    (machine,) = world.vms.alive
    world.vms.die(machine.spec.vm_id, "It was killed.")
    await world.until_event("pod.failed")
    while world.pods.busy:  # noqa: ASYNC110 -- bounded by the test's limit
        await asyncio.sleep(0)
    assert world.leaks == []


async def test_a_paused_pod_is_adopted_without_waiting_for_its_agent(world: World) -> None:
    await paused(world)
    await world.restart()
    found = await world.pods.recover()
    assert found.adopted == ["p1"]
    assert world.plan.calls["agent.connect"] == 0
    assert world.pods.status("p1").state is PodState.PAUSED
    assert not machine_runs(world)
    await world.pods.resume("p1", world.call())
    assert (await world.pods.exec("p1", "c1", TRUE, world.call())).exit_code == 0
    (guest,) = world.guests.by_vm_id.values()
    guest.signal("c1", 9, everyone=False)
    assert (await world.until_event("container.exited")).data["exit_code"] == 137


@pytest.mark.parametrize("state", [PodState.RUNNING, PodState.PAUSED])
async def test_after_a_restart_the_vm_is_as_the_record_says(world: World, state: PodState) -> None:
    await paused(world)
    if state is PodState.RUNNING:
        await world.pods.resume("p1", world.call())
    await world.close()
    (machine,) = world.vms.alive
    machine.running = state is PodState.PAUSED  # the node died between the VM's step and the record's
    await world.start()
    await world.pods.recover()
    assert world.pods.status("p1").state is state
    assert machine_runs(world) is (state is PodState.RUNNING)


async def test_a_session_lost_while_paused_is_opened_again_by_the_resume(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "VM_END_GRACE_S", 0.001)
    await paused(world)
    lose_session(world)
    while (live := world.pods._parts.live["p1"]).session is not None:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert world.observed.sessions_lost == 0
    assert world.pods.status("p1").state is PodState.PAUSED
    await world.pods.resume("p1", world.call())
    assert live.session is not None
    lose_session(world)  # it is watched as before
    await world.until_event("pod.session_restored")


async def test_a_pod_whose_session_is_lost_is_not_paused(world: World) -> None:
    await world.pods.run(pod(), world.call())
    lose_session(world)
    while world.pods._parts.live["p1"].session is not None:  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(AgentError, match="try again"):
        await world.pods.pause("p1", world.call())
    assert machine_runs(world)


@pytest.mark.parametrize(
    ("faults", "verb", "after"),
    [
        ("vm.pause:1=fail", "pause", PodState.RUNNING),
        ("vm.resume:1=fail", "resume", PodState.PAUSED),
        ("agent.set_clock:1=fail", "resume", PodState.PAUSED),
    ],
)
async def test_what_fails_is_taken_back(tmp_path: Path, faults: str, verb: str, after: PodState) -> None:
    world = await World(tmp_path, faults).start()
    await world.pods.run(pod(), world.call())
    if verb == "resume":
        await world.pods.pause("p1", world.call())
    with pytest.raises((HypervisorError, AgentError, VcnodeError)):
        await getattr(world.pods, verb)("p1", world.call())
    assert world.pods.status("p1").state is after
    assert machine_runs(world) is (after is PodState.RUNNING)
    await getattr(world.pods, verb)("p1", world.call())
    await world.close()
