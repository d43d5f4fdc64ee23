"""Pausing containers, waiting for them, and their processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.pods.world import World, pod
from vcnode.errors import AgentError, FailedPreconditionError, NotFoundError, UnavailableError
from vcnode.models.commands import ExecOptions
from vcnode.models.pod import Cmd, ContainerState, PodState

TRUE = ExecOptions(cmd=Cmd(args=("true",)))


def guest_state(world: World) -> str:
    (guest,) = world.guests.by_vm_id.values()
    return guest.containers["c1"].state.state


async def test_a_container_is_paused_and_resumed_and_both_can_be_repeated(world: World) -> None:
    await world.pods.run(pod(), world.call())
    for _ in range(2):
        assert (await world.pods.pause_container("p1", "c1", world.call())).state is ContainerState.PAUSED
    assert guest_state(world) == "paused"
    with pytest.raises(FailedPreconditionError, match="resume it first"):
        await world.pods.exec("p1", "c1", TRUE, world.call())
    for _ in range(2):
        assert (await world.pods.resume_container("p1", "c1", world.call())).state is ContainerState.RUNNING
    assert (await world.kinds())[-2:] == ["container.paused", "container.resumed"]


@pytest.mark.parametrize("recorded", ["paused", "running"])
async def test_after_a_restart_the_guest_is_as_the_record_says(world: World, recorded: str) -> None:
    await world.pods.run(pod(), world.call())
    if recorded == "paused":
        await world.pods.pause_container("p1", "c1", world.call())
    await world.close()
    (guest,) = world.guests.by_vm_id.values()
    guest.containers["c1"].paused = recorded == "running"
    await world.start()
    await world.pods.recover()
    assert guest_state(world) == recorded == world.pods.container_status("p1", "c1").state


@pytest.mark.parametrize("grace_s", [None, 0.0])
async def test_a_paused_container_hears_that_it_shall_stop(world: World, grace_s: float | None) -> None:
    await world.pods.run(pod(), world.call())
    await world.pods.pause_container("p1", "c1", world.call())
    status = await world.pods.stop_container("p1", "c1", grace_s, world.call())
    assert (status.state, status.exit_code) == (ContainerState.STOPPED, 143 if grace_s is None else 137)
    assert (await world.pods.start_container("p1", "c1", world.call())).state is ContainerState.RUNNING


async def test_a_pod_with_a_paused_container_stops_gracefully(world: World) -> None:
    await world.pods.run(pod(), world.call())
    await world.pods.pause_container("p1", "c1", world.call())
    stopped = await world.pods.stop("p1", None, world.call())
    assert (stopped.outcome, stopped.pod.containers[0].exit_code) == ("graceful", 143)


async def test_a_pause_that_fails_leaves_the_container_running(tmp_path: Path) -> None:
    world = await World(tmp_path, "agent.pause_container:1=fail").start()
    await world.pods.run(pod(), world.call())
    with pytest.raises(AgentError):
        await world.pods.pause_container("p1", "c1", world.call())
    assert guest_state(world) == "running"
    await world.close()


# ---- wait --------------------------------------------------------------------------------------------


async def begin(*waits: asyncio.Task[object]) -> None:
    """Let the waits begin; none is over."""
    await asyncio.sleep(0)
    assert not any(wait.done() for wait in waits)


async def test_many_wait_for_an_exit_and_all_are_woken_by_it(world: World) -> None:
    await world.pods.run(pod(), world.call())
    waits = [asyncio.ensure_future(world.pods.wait_container("p1", "c1", "exited")) for _ in range(50)]
    await begin(*waits)
    await world.pods.kill_container("p1", "c1", 15, False, world.call())
    replies = await asyncio.gather(*waits)
    assert {r.container and r.container.exit_code for r in replies} == {143}
    at_once = await world.pods.wait_container("p1", "c1", "exited")
    assert at_once == replies[0]
    assert world.pods._ledger._listeners == {}


async def test_waiting_for_a_start_and_for_a_removal(world: World) -> None:
    await world.pods.create(pod(), world.call())
    running = asyncio.ensure_future(world.pods.wait_container("p1", "c1", "running"))
    exited = asyncio.ensure_future(world.pods.wait_container("p1", "c1", "exited"))
    removed = asyncio.ensure_future(world.pods.wait_container("p1", "c1", "removed"))
    await begin(running, exited, removed)
    await world.pods.start("p1", world.call())
    reply = await running
    assert reply.container is not None
    assert reply.container.state is ContainerState.RUNNING
    await world.pods.stop("p1", 0, world.call())
    await exited
    await world.pods.delete("p1", False, world.call())
    assert (await removed).container is None
    assert (await world.pods.wait_container("p1", "c1", "removed")).container is None


async def test_waiting_for_what_is_gone_or_goes_away_is_not_found(world: World) -> None:
    with pytest.raises(NotFoundError):
        await world.pods.wait_container("p1", "c1", "exited")
    await world.pods.create(pod(), world.call())
    with pytest.raises(NotFoundError):
        await world.pods.wait_container("p1", "c2", "exited")
    wait = asyncio.ensure_future(world.pods.wait_container("p1", "c1", "running"))
    await begin(wait)
    await world.pods.delete("p1", False, world.call())
    with pytest.raises(NotFoundError):
        await wait


async def test_the_end_of_the_vm_ends_the_wait(world: World) -> None:
    await world.pods.run(pod(), world.call())
    wait = asyncio.ensure_future(world.pods.wait_container("p1", "c1", "exited"))
    await begin(wait)
    (machine,) = world.vms.alive
    world.vms.die(machine.spec.vm_id)
    reply = await wait
    assert reply.container is not None
    assert (reply.container.exit_code, reply.container.reason) == (None, "The pod's VM ended.")
    while world.pods.busy:  # noqa: ASYNC110 -- bounded by the test's limit
        await asyncio.sleep(0)


async def test_a_node_that_stops_lets_go_of_all_who_wait(world: World) -> None:
    await world.pods.run(pod(), world.call())
    wait = asyncio.ensure_future(world.pods.wait_container("p1", "c1", "exited"))
    gone = asyncio.ensure_future(world.pods.wait_container("p1", "c1", "exited"))
    await begin(wait, gone)
    gone.cancel()
    await world.pods.wind_down()
    with pytest.raises(UnavailableError, match="stopping"):
        await wait
    assert world.pods._ledger._listeners == {}


# ---- processes ---------------------------------------------------------------------------------------


async def test_processes_are_those_of_a_container_that_lives(world: World) -> None:
    await world.pods.run(pod(), world.call())
    await world.pods.pause_container("p1", "c1", world.call())
    reply = await world.pods.processes("p1", "c1", 10, world.call())
    assert [p.args for p in reply.processes] == [("sleep", "infinity")]
    assert reply.total == 1
    await world.pods.stop_container("p1", "c1", 0, world.call())
    with pytest.raises(FailedPreconditionError):
        await world.pods.processes("p1", "c1", 10, world.call())
    await world.pods.pause("p1", world.call())
    assert world.pods.status("p1").state is PodState.PAUSED
    with pytest.raises(FailedPreconditionError, match="resume it first"):
        await world.pods.processes("p1", "c1", 10, world.call())
