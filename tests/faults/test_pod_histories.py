"""Random histories of a node: commands, faults, cancellations, deaths, restarts, crashes, in any order."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.pods.world import Killed, World, container, pod
from vcnode.errors import StorageError, VcnodeError
from vcnode.models.commands import ExecOptions
from vcnode.models.pod import Cmd, ContainerResources, PodSpec, PodState, RestartPolicy
from vcnode.pods import watch

IDS = ("a", "b")
FEWER = ContainerResources(pids_limit=50)
TRUE = ExecOptions(cmd=Cmd(args=("true",)))


def spec(world: World, pod_id: str) -> PodSpec:
    """A pod whose policies are those of the history."""
    again = world.policy
    return pod(pod_id, [container("c1", restart_policy=again)], restart_policy=again, template="never")


async def die(world: World, pod_id: str) -> None:
    """Let the main process of a container end by itself."""
    for machine in world.vms.alive:
        live = world.pods._parts.live.get(pod_id)
        guest = world.guests.by_vm_id.get(machine.spec.vm_id)
        mine = live is not None and live.vm.record.vm_id == machine.spec.vm_id
        if mine and guest is not None and "c1" in guest.containers:
            guest.signal("c1", 9, everyone=False)


COMMANDS: dict[str, Callable[[World, str], Awaitable[object]]] = {
    "create": lambda w, p: w.pods.create(spec(w, p), w.call("pod.create")),
    "start": lambda w, p: w.pods.start(p, w.call("pod.start")),
    "run": lambda w, p: w.pods.run(spec(w, p), w.call("pod.run")),
    "die c1": lambda w, p: die(w, p),
    "stop": lambda w, p: w.pods.stop(p, None, w.call("pod.stop")),
    "pause": lambda w, p: w.pods.pause(p, w.call("pod.pause")),
    "resume": lambda w, p: w.pods.resume(p, w.call("pod.resume")),
    "kill": lambda w, p: w.pods.stop(p, 0, w.call("pod.stop")),
    "delete": lambda w, p: w.pods.delete(p, False, w.call("pod.delete")),
    "force": lambda w, p: w.pods.delete(p, True, w.call("pod.delete")),
    "exec": lambda w, p: w.pods.exec(p, "c1", TRUE, w.call("container.exec")),
    "add": lambda w, p: w.pods.create_container(p, container("c2"), w.call("container.create")),
    "start c2": lambda w, p: w.pods.start_container(p, "c2", w.call("container.start")),
    "stop c1": lambda w, p: w.pods.stop_container(p, "c1", 0, w.call("container.stop")),
    "pause c1": lambda w, p: w.pods.pause_container(p, "c1", w.call("container.pause")),
    "resume c1": lambda w, p: w.pods.resume_container(p, "c1", w.call("container.resume")),
    "limit c1": lambda w, p: w.pods.update_container(p, "c1", FEWER, w.call("container.update")),
    "shrink": lambda w, p: w.pods.resize(p, 128, w.call("pod.resize")),
    "grow": lambda w, p: w.pods.resize(p, 256, w.call("pod.resize")),
    "delete c2": lambda w, p: w.pods.delete_container(p, "c2", True, w.call("container.delete")),
}
DISTURBANCES = ("none", "none", "fail", "cancel", "vm dies", "session lost", "crash")

steps = st.tuples(
    st.sampled_from(sorted(COMMANDS)),
    st.sampled_from(IDS),
    st.sampled_from(DISTURBANCES),
    st.integers(0, 14),
)
groups = st.lists(st.one_of(st.lists(steps, min_size=1, max_size=3), st.just("restart")), max_size=12)


def disturb(world: World, how: str, after: int, task: asyncio.Task[object]) -> None:
    """Let something happen *after* so many further steps of the node."""

    def die() -> None:
        for machine in world.vms.alive:
            world.vms.die(machine.spec.vm_id, "It died.")

    def lose() -> None:
        for session in list(world.agent._sessions.values()):
            session.lose("It was lost.")

    def fail() -> None:
        raise StorageError("This step failed.")

    acts: dict[str, Callable[[], object]] = {
        "fail": fail, "cancel": task.cancel, "vm dies": die, "session lost": lose, "crash": world.plan.die,
    }  # fmt: skip
    if how in acts:
        world.plan.at[len(world.plan.log) + after] = lambda: (acts[how](), None)[1]


async def quiet(world: World) -> None:
    """Until nothing goes on in the background, or the node is dead."""
    for _ in range(3):
        await asyncio.sleep(0)
    while not world.plan.dead and (  # noqa: ASYNC110
        world.pods.busy or world.pods.unsaved or world.pods._restarter._planned
    ):
        await asyncio.sleep(0)


async def together(world: World, group: list[tuple[str, str, str, int]]) -> None:
    """Send commands at once; each ends with a reply or with one of our errors."""
    tasks = []
    for verb, pod_id, how, after in group:
        task: asyncio.Task[object] = asyncio.ensure_future(COMMANDS[verb](world, pod_id))  # type: ignore[arg-type]
        disturb(world, how, after, task)
        tasks.append(task)
    died = asyncio.ensure_future(world.plan.died.wait())
    everything = asyncio.ensure_future(asyncio.wait(tasks))
    await asyncio.wait([everything, died], return_when=asyncio.FIRST_COMPLETED)
    if world.plan.dead:
        for task in tasks:
            task.cancel()
    await everything
    died.cancel()
    world.plan.at.clear()
    for task in tasks:
        if not task.cancelled() and (error := task.exception()) is not None:
            assert isinstance(error, VcnodeError | Killed), repr(error)


async def restart(world: World, policy: RestartPolicy) -> None:
    """Start again on what is there, after a crash or in good order."""
    await (world.crash() if world.plan.dead else world.close())
    await world.start("")
    await world.pods.recover()
    if policy is not RestartPolicy.NEVER:
        world.pods.start_restarts()


async def holds(world: World) -> None:
    """Whatever the host holds belongs to a pod that is listed and says so."""
    listed = world.pods.list({}, ()).pods
    owners = {p.hypervisor.vm_id for p in listed if p.hypervisor is not None}
    for leak in world.leaks:
        assert any(owner in leak for owner in owners), f"{leak} belongs to nobody in {listed}"
    for status in listed:
        if status.state is PodState.FAILED:
            assert status.reason
        if status.state in (PodState.READY, PodState.STOPPED):
            assert status.hypervisor is None
            assert status.restart_at is None
        for each in status.containers:
            assert each.restart_at is None or each.state == "stopped"


async def at_once(_seconds: float) -> None:
    """No restart waits longer than the loop takes for one turn."""
    await asyncio.sleep(0)


async def history(path: Path, groups: list[object], policy: RestartPolicy) -> None:
    world = World(path)
    world.policy = policy
    world.naps = at_once  # type: ignore[assignment]
    await world.start()
    if policy is not RestartPolicy.NEVER:
        world.pods.start_restarts()
    for group in groups:
        if isinstance(group, list):
            await together(world, group)
            await quiet(world)
        if world.plan.dead or group == "restart":
            await restart(world, policy)
        await quiet(world)
        await holds(world)
    for status in world.pods.list({}, ()).pods:
        await world.pods.delete(status.pod_id, True, world.call("pod.delete"))
    assert world.leaks == []
    sequences = [int(e.sequence) for e in await world.events()]
    assert sequences == list(range(1, len(sequences) + 1))
    await world.close()


@pytest.mark.parametrize("policy", [RestartPolicy.NEVER, RestartPolicy.ALWAYS])
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(groups)
def test_no_history_loses_or_leaks_anything(policy: RestartPolicy, groups: list[object]) -> None:
    place = Path("/dev/shm")
    patches = {"SAVE_PAUSES_S": (0.0,), "VM_END_GRACE_S": 0.001, "RECONNECT_PAUSE_S": 0.001}
    with (
        tempfile.TemporaryDirectory(prefix="vc-", dir=place if place.is_dir() else None) as path,
        mock.patch.multiple(watch, **patches),
    ):
        asyncio.run(asyncio.wait_for(history(Path(path), groups, policy), 20))
