"""Restart policies: what starts again, when, how often, and what stops that."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.unit.pods.world import World, container, pod
from vcnode.models.pod import ContainerSpec, ContainerState, PodSpec, PodState, RestartPolicy
from vcnode.models.records import Restarts
from vcnode.pods.backoff import Backoff, after_end

ALWAYS, ON_FAILURE, NEVER = RestartPolicy.ALWAYS, RestartPolicy.ON_FAILURE, RestartPolicy.NEVER
NOW = datetime(2030, 1, 1, tzinfo=UTC)
BACKOFF = Backoff(first_s=1, most_s=300, reset_after_s=600)


class Time:
    """Stands still but for the test."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def go(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
async def world(tmp_path: Path, time: Time) -> AsyncIterator[World]:
    built = World(tmp_path)
    built.clock = time
    await built.start()
    built.pods.start_restarts()
    yield built
    await built.close()


async def until(world: World, state: str, container_id: str = "c1", restarts: int | None = None) -> None:
    """Wait until a container is in a state, after so many restarts."""
    while True:
        status = world.pods.container_status("p1", container_id)
        if status.state == state and restarts in (None, status.restart_count):
            return
        await asyncio.sleep(0)


async def asleep(world: World, count: int = 1) -> None:
    """Wait until so many restarts are waited for."""
    while world.naps.count != count:  # noqa: ASYNC110 -- bounded by the test's limit
        await asyncio.sleep(0)


async def wake(world: World, time: Time) -> float:
    """Let the time pass until the restart that is waited for; returns how long that was."""
    await asleep(world)
    waited_s = world.naps.asked[-1]
    time.go(waited_s)
    world.naps.wake()
    return waited_s


def kill(world: World, container_id: str = "c1", number: int = 9) -> None:
    (guest,) = world.guests.by_vm_id.values()
    guest.signal(container_id, number, everyone=False)


def kill_vm(world: World) -> None:
    (machine,) = world.vms.alive
    world.vms.die(machine.spec.vm_id, "It was killed.")


# ---- the plan, pure ----------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1000), max_size=60), st.integers(1, 5) | st.none())
def test_waits_double_up_to_the_longest_and_begin_anew_after_a_healthy_time(
    runs_s: list[float], most: int | None
) -> None:
    state, in_a_row = Restarts(), 0
    for ran_s in runs_s:
        state = after_end(
            state, policy=ON_FAILURE, max_restarts=most, failed=True, ran_s=ran_s, now=NOW, backoff=BACKOFF
        )
        if ran_s >= 600:
            in_a_row = 0
        if most is not None and in_a_row >= most:
            assert state.at is None
            continue
        assert state.at is not None
        assert (state.at - NOW).total_seconds() == min(300, 2**in_a_row)
        in_a_row += 1
        assert state.streak == in_a_row


@pytest.mark.parametrize(
    ("policy", "failed", "again"),
    [(NEVER, True, False), (NEVER, False, False), (ON_FAILURE, True, True), (ON_FAILURE, False, False),
     (ALWAYS, True, True), (ALWAYS, False, True)],
)  # fmt: skip
def test_the_policy_says_what_starts_again(policy: RestartPolicy, failed: bool, again: bool) -> None:
    for cancelled in (False, True):
        found = after_end(
            Restarts(cancelled=cancelled),
            policy=policy,
            max_restarts=None,
            failed=failed,
            ran_s=1,
            now=NOW,
            backoff=BACKOFF,
        )
        assert (found.at is not None) is (again and not cancelled)


@pytest.mark.parametrize("policy", ["always", "never"])
def test_a_number_of_restarts_goes_with_on_failure_only(policy: str) -> None:
    for model, root in ((ContainerSpec, {"image": "x"}), (PodSpec, {})):
        with pytest.raises(ValidationError, match="on-failure"):
            model.model_validate({"restart_policy": policy, "max_restarts": 3, **root}, strict=False)


# ---- containers --------------------------------------------------------------------------------------


async def test_a_container_starts_again_and_its_status_and_events_tell_it(world: World, time: Time) -> None:
    await world.pods.run(pod(containers=[container(restart_policy=ALWAYS)]), world.call())
    waited = []
    for count in range(1, 4):
        kill(world)
        await until(world, "stopped")
        status = world.pods.container_status("p1", "c1")
        assert status.exit_code == 137
        assert status.restart_at is not None
        waited.append(await wake(world, time))
        await until(world, "running", restarts=count)
        assert world.pods.container_status("p1", "c1").restart_at is None
    assert waited == [1, 2, 4]
    time.go(600)
    kill(world)
    assert await wake(world, time) == 1
    await until(world, "running", restarts=4)
    kinds = await world.kinds("p1/c1")
    assert kinds[-3:] == ["container.exited", "container.restarting", "container.started"]
    assert all(e.commandid is None for e in (await world.events())[-3:])
    assert world.observed.restarts == ["container"] * 4


async def test_on_failure_gives_up_after_so_many_in_a_row_and_counts_no_success(
    world: World, time: Time
) -> None:
    spec = container(restart_policy=ON_FAILURE, max_restarts=2)
    fine = container("fine", "true", restart_policy=ON_FAILURE)
    await world.pods.run(pod(containers=[spec, fine]), world.call())
    for count in (1, 2):
        kill(world)
        await wake(world, time)
        await until(world, "running", restarts=count)
    kill(world)
    await until(world, "stopped")
    assert world.pods.container_status("p1", "c1").restart_at is None
    assert world.pods.container_status("p1", "fine").state is ContainerState.STOPPED
    assert world.pods.status("p1").state is PodState.RUNNING
    assert world.naps.count == 0
    assert (await world.pods.start_container("p1", "c1", world.call())).restart_count == 0


async def test_a_stop_is_for_good_until_somebody_starts_it(world: World, time: Time) -> None:
    await world.pods.run(pod(containers=[container(restart_policy=ALWAYS)]), world.call())
    status = await world.pods.stop_container("p1", "c1", None, world.call())
    assert (status.state, status.restart_at) == (ContainerState.STOPPED, None)
    await world.pods.start_container("p1", "c1", world.call())
    kill(world)
    await asleep(world)
    status = await world.pods.stop_container("p1", "c1", None, world.call())
    assert status.restart_at is None
    await asleep(world, 0)
    assert "container.restart_cancelled" in await world.kinds()
    await world.pods.start_container("p1", "c1", world.call())
    kill(world)
    await wake(world, time)
    await until(world, "running", restarts=1)


async def test_what_waits_goes_with_its_container_and_its_pod(world: World) -> None:
    both = [container(restart_policy=ALWAYS), container("c2", restart_policy=ALWAYS)]
    await world.pods.run(pod(containers=both), world.call())
    kill(world)
    kill(world, "c2")
    await asleep(world, 2)
    await world.pods.delete_container("p1", "c1", False, world.call())
    await asleep(world, 1)
    stopped = await world.pods.stop("p1", None, world.call())
    assert [c.restart_at for c in stopped.pod.containers] == [None]
    await asleep(world, 0)


async def test_a_pod_that_is_stopped_restarts_none_of_its_containers(world: World) -> None:
    await world.pods.run(pod(containers=[container(restart_policy=ALWAYS)]), world.call())
    await world.pods.stop("p1", None, world.call())
    assert "container.restarting" not in await world.kinds()
    assert world.pods.status("p1").containers[0].restart_at is None


async def test_a_restart_that_is_due_survives_the_node_agent_and_happens_once(
    world: World, time: Time
) -> None:
    await world.pods.run(pod(containers=[container(restart_policy=ALWAYS)]), world.call())
    kill(world)
    await asleep(world)
    await world.restart()
    await world.pods.recover()
    assert world.pods.container_status("p1", "c1").state is ContainerState.STOPPED
    time.go(5)
    world.pods.start_restarts()
    await until(world, "running", restarts=1)
    assert world.plan.calls["agent.start_container"] == 1
    assert world.naps.count == 0


async def test_a_restart_that_fails_is_tried_again_later(tmp_path: Path, time: Time) -> None:
    world = World(tmp_path, "agent.start_container:2=fail")
    world.clock = time
    await world.start()
    world.pods.start_restarts()
    await world.pods.run(pod(containers=[container(restart_policy=ALWAYS)]), world.call())
    kill(world)
    assert await wake(world, time) == 1
    assert await wake(world, time) == 2
    await until(world, "running", restarts=1)
    assert (await world.kinds()).count("container.restarting") == 2
    await world.close()


async def test_nothing_restarts_in_a_paused_pod_until_it_is_resumed(world: World, time: Time) -> None:
    await world.pods.run(pod(containers=[container(restart_policy=ALWAYS)]), world.call())
    kill(world)
    await asleep(world)
    await world.pods.pause("p1", world.call())
    await asleep(world, 0)
    time.go(5)
    await world.pods.resume("p1", world.call())
    await until(world, "running", restarts=1)


async def restarting(tmp_path: Path, time: Time, fault: str) -> World:
    """A world in which a container is just being restarted."""
    world = World(tmp_path, f"agent.start_container:2={fault}")
    world.clock = time
    await world.start()
    world.pods.start_restarts()
    await world.pods.run(pod(containers=[container(restart_policy=ALWAYS)]), world.call())
    kill(world)
    await wake(world, time)
    while world.plan.calls["agent.start_container"] < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return world


async def test_a_stop_overtakes_a_restart(tmp_path: Path, time: Time) -> None:
    world = await restarting(tmp_path, time, "hang")
    status = await world.pods.stop_container("p1", "c1", None, world.call("container.stop"))
    assert (status.state, status.restart_at) == (ContainerState.STOPPED, None)
    assert world.naps.count == 0
    await world.close()


async def test_other_commands_wait_for_a_restart_and_are_not_refused(tmp_path: Path, time: Time) -> None:
    world = await restarting(tmp_path, time, "delay(0.02)")
    await world.pods.create_container("p1", container("c2"), world.call())
    assert world.pods.container_status("p1", "c1").restart_count == 1
    await world.close()


# ---- pods --------------------------------------------------------------------------------------------


async def until_pod(world: World, state: PodState, restarts: int | None = None) -> None:
    while True:
        status = world.pods.status("p1")
        if status.state is state and restarts in (None, status.restart_count) and not world.pods.busy:
            return
        await asyncio.sleep(0)


async def test_a_pod_whose_vm_dies_starts_again(world: World, time: Time) -> None:
    await world.pods.run(pod(restart_policy=ALWAYS), world.call())
    for count, wait_s in ((1, 1), (2, 2)):
        kill_vm(world)
        await until_pod(world, PodState.FAILED)
        assert world.pods.status("p1").restart_at is not None
        assert await wake(world, time) == wait_s
        await until_pod(world, PodState.RUNNING, count)
        assert world.pods.container_status("p1", "c1").state is ContainerState.RUNNING
    assert (await world.kinds("p1"))[-4:] == ["pod.failed", "pod.restarting", "pod.starting", "pod.started"]
    assert world.observed.restarts == ["pod", "pod"]


async def test_a_failed_pod_that_is_stopped_or_deleted_stays_down(world: World) -> None:
    await world.pods.run(pod(restart_policy=ALWAYS), world.call())
    kill_vm(world)
    await asleep(world)
    assert (await world.pods.stop("p1", None, world.call())).pod.restart_at is None
    await asleep(world, 0)
    assert "pod.restart_cancelled" in await world.kinds()
    await world.pods.start("p1", world.call())
    kill_vm(world)
    await asleep(world)
    await world.pods.delete("p1", False, world.call())
    await asleep(world, 0)
    assert world.leaks == []


async def test_a_pod_whose_vm_ended_while_the_node_was_away_starts_again(world: World, time: Time) -> None:
    await world.pods.run(pod(restart_policy=ON_FAILURE, max_restarts=1), world.call())
    await world.close()
    kill_vm(world)
    await world.start()
    await world.pods.recover()
    assert world.pods.status("p1").state is PodState.FAILED
    world.pods.start_restarts()
    await wake(world, time)
    await until_pod(world, PodState.RUNNING, 1)
    kill_vm(world)
    await until_pod(world, PodState.FAILED)
    assert world.pods.status("p1").restart_at is None


async def test_a_restart_of_a_pod_that_fails_is_tried_again_later(tmp_path: Path, time: Time) -> None:
    world = World(tmp_path, "hypervisor.launch:2=fail")
    world.clock = time
    await world.start()
    world.pods.start_restarts()
    await world.pods.run(pod(restart_policy=ALWAYS), world.call())
    kill_vm(world)
    assert await wake(world, time) == 1
    assert await wake(world, time) == 2
    await until_pod(world, PodState.RUNNING, 1)
    await world.close()


async def test_a_restart_that_fails_in_no_foreseen_way_is_tried_again_later(
    tmp_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    world.clock = time
    await world.start()
    world.pods.start_restarts()
    await world.pods.run(pod(restart_policy=ALWAYS), world.call())

    async def short(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(world.hypervisor, "launch", short)
        kill_vm(world)
        assert await wake(world, time) == 1
        async with asyncio.timeout(10):
            while len(world.naps.asked) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
    assert await wake(world, time) == 2
    await until_pod(world, PodState.RUNNING, 1)
    await world.close()


@pytest.mark.parametrize("how", ["close", "crash"])
async def test_a_restart_of_a_pod_that_the_node_agent_did_not_finish_stays_due(
    tmp_path: Path, time: Time, how: str
) -> None:
    world = World(tmp_path, "hypervisor.launch:2=hang")
    world.clock = time
    await world.start()
    world.pods.start_restarts()
    await world.pods.run(pod(restart_policy=ALWAYS), world.call())
    kill_vm(world)
    await wake(world, time)
    while world.plan.calls["hypervisor.launch"] < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await getattr(world, how)()
    await world.start("")
    await world.pods.recover()
    assert world.leaks == []
    world.pods.start_restarts()
    await until_pod(world, PodState.RUNNING, 1)
    await world.close()


async def test_a_start_that_somebody_asked_for_and_that_fails_is_not_repeated(
    tmp_path: Path, time: Time
) -> None:
    world = World(tmp_path, "hypervisor.launch:1=fail")
    world.clock = time
    await world.start()
    world.pods.start_restarts()
    await world.pods.create(pod(restart_policy=ALWAYS), world.call())
    with pytest.raises(Exception, match="fault plan"):
        await world.pods.start("p1", world.call())
    assert world.pods.status("p1").restart_at is None
    assert world.naps.count == 0
    await world.close()
