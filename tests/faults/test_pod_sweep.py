"""Every step of every command: fail it, cancel it, cancel twice, fail its undo, kill the node there.

A step is a call of a driver or a commit of the database. Whatever is done to it, afterwards every pod is
running and answers, or is cleanly stopped, or is listed ``failed``; no VM, directory, share or tap is held
but by a pod that says so; ``pod.delete`` works; and the events have no gaps.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.pods.world import SLEEP, Killed, World, container, pod
from vcnode.errors import CleanupError, StorageError, VcnodeError
from vcnode.models.commands import ExecOptions
from vcnode.models.pod import Cmd, ContainerResources, ContainerState, PodState, PodStatus, RestartPolicy
from vcnode.pods import watch
from vcnode.pods.marks import new_vm_id

Act = Callable[[World], Awaitable[object]]

FEWER = ContainerResources(pids_limit=50)
TRUE = ExecOptions(cmd=Cmd(args=("true",)))
IMAGE = "busybox"
SPEC = pod(containers=[container("c1"), container("c2", image=IMAGE)])
EXTRA = container("c4", image=IMAGE)


async def nothing(world: World) -> None:
    await world.images.import_(IMAGE, "/roots/image", world.call("image.import"))


async def created(world: World) -> None:
    await nothing(world)
    await world.pods.create(SPEC, world.call("pod.create"))


async def running(world: World) -> None:
    await nothing(world)
    await world.pods.run(SPEC, world.call("pod.run"))


async def running_with_extra(world: World) -> None:
    await running(world)
    await world.pods.create_container("p1", EXTRA, world.call("container.create"))


async def paused(world: World) -> None:
    await running(world)
    await world.pods.pause("p1", world.call("pod.pause"))


async def frozen(world: World) -> None:
    await running(world)
    await world.pods.pause_container("p1", "c2", world.call("container.pause"))


async def shrunk(world: World) -> None:
    await nothing(world)
    await world.pods.run(SPEC.model_copy(update={"template": "never"}), world.call("pod.run"))
    await world.pods.resize("p1", 160, world.call("pod.resize"))


async def stopped(world: World) -> None:
    await running(world)
    await world.pods.stop("p1", None, world.call("pod.stop"))


COMMANDS: dict[str, tuple[Act, Act]] = {
    "create": (nothing, lambda w: w.pods.create(SPEC, w.call("pod.create"))),
    "start": (created, lambda w: w.pods.start("p1", w.call("pod.start"))),
    "run": (nothing, lambda w: w.pods.run(SPEC, w.call("pod.run"))),
    "restart": (stopped, lambda w: w.pods.start("p1", w.call("pod.start"))),
    "pause": (running, lambda w: w.pods.pause("p1", w.call("pod.pause"))),
    "resume": (paused, lambda w: w.pods.resume("p1", w.call("pod.resume"))),
    "stop paused": (paused, lambda w: w.pods.stop("p1", None, w.call("pod.stop"))),
    "stop": (running, lambda w: w.pods.stop("p1", None, w.call("pod.stop"))),
    "kill": (running, lambda w: w.pods.stop("p1", 0, w.call("pod.stop"))),
    "delete": (stopped, lambda w: w.pods.delete("p1", False, w.call("pod.delete"))),
    "delete by force": (running, lambda w: w.pods.delete("p1", True, w.call("pod.delete"))),
    "exec": (running, lambda w: w.pods.exec("p1", "c1", TRUE, w.call("container.exec"))),
    "image import": (
        nothing,
        lambda w: w.images.import_("other", "/roots/other", w.call("image.import")),
    ),
    "container create": (
        running,
        lambda w: w.pods.create_container("p1", EXTRA, w.call("container.create")),
    ),
    "container start": (
        running_with_extra,
        lambda w: w.pods.start_container("p1", "c4", w.call("container.start")),
    ),
    "container stop": (running, lambda w: w.pods.stop_container("p1", "c2", None, w.call("container.stop"))),
    "container pause": (running, lambda w: w.pods.pause_container("p1", "c2", w.call("container.pause"))),
    "container resume": (
        frozen,
        lambda w: w.pods.resume_container("p1", "c2", w.call("container.resume")),
    ),
    "container update": (
        running,
        lambda w: w.pods.update_container("p1", "c2", FEWER, w.call("container.update")),
    ),
    "pod grow": (shrunk, lambda w: w.pods.resize("p1", 200, w.call("pod.resize"))),
    "pod shrink": (shrunk, lambda w: w.pods.resize("p1", 128, w.call("pod.resize"))),
    "container delete": (
        running,
        lambda w: w.pods.delete_container("p1", "c2", True, w.call("container.delete")),
    ),
}
"""Name: what comes before, and the command that is swept."""


async def restarting(world: World) -> None:
    """A pod whose policies start it and its containers again, at once."""
    world.naps = no_nap  # type: ignore[assignment]
    world.pods._restarter._sleep = no_nap
    again = RestartPolicy.ALWAYS
    await nothing(world)
    spec = pod(containers=[container("c1", restart_policy=again)], restart_policy=again)
    await world.pods.run(spec, world.call("pod.run"))
    world.pods.start_restarts()


async def no_nap(_seconds: float) -> None:
    await asyncio.sleep(0)


async def end_container(world: World) -> None:
    """The main process ends by itself; until the node has started it again."""
    (machine,) = world.vms.alive
    world.guests.by_vm_id[machine.spec.vm_id].signal("c1", 9, everyone=False)
    while world.pods.status("p1").containers[0].restart_count != 1:  # noqa: ASYNC110 -- no event for tests
        await asyncio.sleep(0)
    await settled(world, "container restart")


async def end_vm(world: World) -> None:
    """The VM ends by itself; until the node has started another one."""
    (machine,) = world.vms.alive
    world.vms.die(machine.spec.vm_id, "It died.")
    while (now := world.pods.status("p1")).restart_count != 1 or now.state != "running":  # noqa: ASYNC110
        await asyncio.sleep(0)
    await settled(world, "pod restart")


ACTORS: dict[str, tuple[Act, Act]] = {
    "container ends": (restarting, end_container),
    "VM ends": (restarting, end_vm),
}
"""As `COMMANDS`, of what the node does without one. A liveness probe ends a main process, in the guest;
what follows is the same."""

SETTLE_LIMIT_S = 10.0
UNDOS = ("network.detach", "storage.remove_vm_dir", "vm.stop", "hypervisor.kill", "storage.unshare")


async def steps_of(path: Path, name: str) -> tuple[int, list[str]]:
    """Position of the command's first step, and its steps when all goes well."""
    before, command = (COMMANDS | ACTORS)[name]
    world = await World(path).start()
    await before(world)
    first = len(world.plan.log)
    await command(world)
    steps = world.plan.log[first:]
    await world.close()
    return first, steps


async def attempt(world: World, name: str) -> BaseException | None:
    """Run the swept command to its end; the error it ended with."""
    task = asyncio.ensure_future((COMMANDS | ACTORS)[name][1](world))
    world.task = task  # type: ignore[attr-defined]
    died = asyncio.ensure_future(world.plan.died.wait())
    await asyncio.wait([task, died], timeout=SETTLE_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
    died.cancel()
    if not task.done() and not world.plan.dead:
        task.cancel()
        pytest.fail(f"{name} does not end after step {len(world.plan.log)} ({world.plan.log[-1]})")
    if world.plan.dead:  # perhaps in a watcher, not in the command: that dies with its node, too
        task.cancel()
        await asyncio.wait([task])
        return Killed()
    return asyncio.CancelledError() if task.cancelled() else task.exception()


async def check(world: World, where: str) -> None:
    """The invariant, and that everything can be removed afterwards."""
    await settled(world, where)
    for status in world.pods.list({}, ()).pods:
        if status.state is PodState.RUNNING:
            assert all(machine.running for machine in world.vms.alive), where
            check_sizes(world, status, where)
            for each in status.containers:
                if each.state is ContainerState.PAUSED:
                    each = await world.pods.resume_container(
                        status.pod_id, each.container_id, world.call("container.resume")
                    )
                if each.state is ContainerState.RUNNING:
                    result = await world.pods.exec(status.pod_id, each.container_id, TRUE, world.call())
                    assert result.exit_code == 0, where
        elif status.state is PodState.PAUSED:
            assert not any(machine.running for machine in world.vms.alive), where
            await world.pods.resume(status.pod_id, world.call("pod.resume"))
            result = await world.pods.exec(status.pod_id, "c1", TRUE, world.call())
            assert result.exit_code == 0, where
        elif status.state is PodState.FAILED:
            assert status.reason, where
            assert bool(world.leaks) <= bool(status.leftovers), f"{where}: {world.leaks}"
        else:
            assert status.state in (PodState.READY, PodState.STOPPED), f"{where}: {status.state}"
            assert world.leaks == [], where
    audit = await world.pods.audit(repair=False)
    owed = {p.pod_id for p in world.pods.list({}, ()).pods}
    assert [h for h in audit.holdings if h.orphan or (h.vm_id and h.pod_id not in owed)] == [], where
    await delete_all(world, where)
    sequences = [int(e.sequence) for e in await world.events()]
    assert sequences == list(range(1, len(sequences) + 1)), where


def check_sizes(world: World, status: PodStatus, where: str) -> None:
    """The VM and the guest have the limits that the record tells."""
    for machine in world.vms.alive:
        assert machine.mem_size_mib in (0, status.mem_size_mib), where
        guest = world.guests.by_vm_id[machine.spec.vm_id]
        for each in status.containers:
            if each.container_id in guest.containers:
                assert guest.containers[each.container_id].spec.resources == each.resources, where


async def delete_all(world: World, where: str) -> None:
    """Delete every pod; nothing is left then."""
    for status in world.pods.list({}, ()).pods:
        assert (await world.pods.delete(status.pod_id, True, world.call("pod.delete"))).existed, where
    assert world.pods.list({}, ()).pods == (), where
    assert world.leaks == [], where


async def settled(world: World, where: str) -> None:
    """Until what was noticed in the background is done: nobody holds a pod any more."""
    try:
        async with asyncio.timeout(SETTLE_LIMIT_S):
            while world.pods.busy or world.pods.unsaved:  # noqa: ASYNC110 -- no event says that all is quiet
                await asyncio.sleep(0)
    except TimeoutError:
        pytest.fail(f"{where}: it never gets quiet")


def worlds(path: Path) -> Iterator[World]:
    """One fresh world after another."""
    for number in itertools.count():
        directory = path / f"w{number}"
        directory.mkdir()
        yield World(directory)


def raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again at once."""
    monkeypatch.setattr(watch, "SAVE_PAUSES_S", (0.0,))


each_command = pytest.mark.parametrize("name", COMMANDS)
each_kind = pytest.mark.parametrize("name", ["start", "stop", "delete by force", "container start"])
"""One of each kind, where more would tell nothing new."""


async def sweep(
    path: Path, name: str, disturb: Callable[[World, int], None], *, only: str | None = None
) -> list[tuple[World, str, BaseException | None]]:
    """Run the command once per step, disturbed there; worlds are left open."""
    (path / "plain").mkdir()
    first, steps = await steps_of(path / "plain", name)
    assert steps, "nothing to sweep"
    ended = []
    fresh = worlds(path)
    for offset, step in enumerate(steps):
        if only is not None and step != only:
            continue
        world = await next(fresh).start()
        await (COMMANDS | ACTORS)[name][0](world)
        assert len(world.plan.log) == first
        disturb(world, first + offset)
        error = await attempt(world, name)
        ended.append((world, f"{name}, step {offset} ({step}): {error!r}", error))
    return ended


@each_command
async def test_a_step_that_fails_leaves_a_clean_state(tmp_path: Path, name: str) -> None:
    def fail(world: World, position: int) -> None:
        world.plan.at[position] = raising(StorageError("This step failed."))

    for world, where, error in await sweep(tmp_path, name, fail):
        assert error is None or isinstance(error, VcnodeError), where
        await check_mended(world, where)


@each_command
async def test_a_step_that_fails_with_every_undo_after_it_is_never_forgotten(
    tmp_path: Path, name: str
) -> None:
    def fail(world: World, position: int) -> None:
        def act() -> None:
            world.plan.failing = UNDOS
            raise StorageError("This step failed.")

        world.plan.at[position] = act

    for world, where, error in await sweep(tmp_path, name, fail):
        assert error is None or isinstance(error, VcnodeError), where
        if world.leaks:
            assert [p.state for p in world.pods.list({}, ()).pods] in (
                [PodState.FAILED],
                [PodState.RUNNING],
                [PodState.PAUSED],
                [PodState.STARTING],
                [PodState.STOPPING],
            ), where
            with contextlib.suppress(CleanupError):
                await world.pods.delete("p1", True, world.call("pod.delete"))
        world.plan.failing = ()
        await check_mended(world, where)


@each_command
async def test_a_cancelled_step_leaves_a_clean_state(tmp_path: Path, name: str) -> None:
    def cancel(world: World, position: int) -> None:
        world.plan.at[position] = lambda: world.task.cancel()  # type: ignore[attr-defined]

    for world, where, error in await sweep(tmp_path, name, cancel):
        assert error is None or isinstance(error, asyncio.CancelledError | VcnodeError), where
        await check(world, where)
        await world.close()


@each_kind
async def test_cancelling_again_during_the_undo_changes_nothing(tmp_path: Path, name: str) -> None:
    def cancel(world: World, position: int) -> None:
        for later in range(position, position + 6):
            world.plan.at[later] = lambda: world.task.cancel()  # type: ignore[attr-defined]

    for world, where, error in await sweep(tmp_path, name, cancel):
        assert error is None or isinstance(error, asyncio.CancelledError | VcnodeError), where
        await check(world, where)
        await world.close()


@pytest.mark.parametrize("name", [*COMMANDS, *ACTORS])
async def test_a_node_killed_at_any_step_recovers(tmp_path: Path, name: str) -> None:
    def kill(world: World, position: int) -> None:
        world.plan.at[position] = world.plan.die

    for world, where, error in await sweep(tmp_path, name, kill):
        assert isinstance(error, Killed), where
        await world.crash()
        await world.start()
        await world.pods.recover()
        await check(world, where)
        await world.close()


@pytest.mark.parametrize("died_at", ["hypervisor.launch", "agent.start_container", None])
async def test_a_recovery_killed_at_any_step_is_done_by_the_next(tmp_path: Path, died_at: str | None) -> None:
    """Of a node that died in the middle of a start, or (None) while a pod ran and an orphan was about."""

    async def dead(world: World) -> None:
        await (running if died_at is None else created)(world)
        await world.storage.make_vm_dir(new_vm_id(world.settings))
        if died_at is not None:
            task = asyncio.ensure_future(world.pods.start("p1", world.call("pod.start")))
            seen = len(world.plan.log)
            while died_at not in world.plan.log[seen:]:  # noqa: ASYNC110 -- the plan tells only of deaths
                await asyncio.sleep(0)
            await world.crash()
            await asyncio.wait([task], timeout=SETTLE_LIMIT_S)
        else:
            await world.crash()
        await world.start()

    (tmp_path / "plain").mkdir()
    plain = await World(tmp_path / "plain").start()
    await dead(plain)
    await plain.pods.recover()
    steps = list(plain.plan.log)
    assert "storage.held" in steps
    assert "storage.remove_vm_dir" in steps
    await check(plain, "recovery")
    await plain.close()

    fresh = worlds(tmp_path)
    for position, step in enumerate(steps):
        world = await next(fresh).start()
        await dead(world)
        world.plan.at[position] = world.plan.die
        task = asyncio.ensure_future(world.pods.recover())
        died = asyncio.ensure_future(world.plan.died.wait())
        await asyncio.wait([task, died], timeout=SETTLE_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        assert world.plan.dead, f"step {position} ({step}) was not reached"
        task.cancel()
        await asyncio.wait([task])
        await world.crash()
        await world.start()
        await world.pods.recover()
        await check(world, f"recovery killed at step {position} ({step})")
        await world.close()


@each_kind
async def test_a_disk_that_is_full_from_a_step_on_loses_nothing(tmp_path: Path, name: str) -> None:
    """Commits fail from here on until the operator has made room; then stop and delete mend everything."""

    def fill(world: World, position: int) -> None:
        def act() -> None:
            world.plan.failing = ("commit",)
            raise StorageError("The disk is full.")

        world.plan.at[position] = act

    for world, where, error in await sweep(tmp_path, name, fill, only="commit"):
        assert isinstance(error, VcnodeError), where
        world.plan.failing = ()
        await check_mended(world, where)


async def check_mended(world: World, where: str) -> None:
    """As `check`, but a pod may be half-way when its last commit failed: a stop mends that."""
    await settled(world, where)
    for status in world.pods.list({}, ()).pods:
        if status.state in (PodState.STARTING, PodState.STOPPING):
            await world.pods.stop(status.pod_id, 0, world.call("pod.stop"))
    await check(world, where)
    await world.close()


def test_the_sweep_covers_a_main_process_that_lives() -> None:
    assert all(c.cmd == SLEEP for c in SPEC.containers)
