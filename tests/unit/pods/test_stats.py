"""``pod.stats``: once and again, and what wakes a guest."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

import pytest

from tests.unit.pods.world import World, pod
from vcnode.errors import (
    AgentError,
    FailedPreconditionError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from vcnode.models.pod import AgentType
from vcnode.models.stats import PodStatsOf


def asked(world: World) -> int:
    """How often a guest was asked."""
    return world.plan.log.count("agent.read_stats")


async def test_a_running_pod_is_told_with_all_its_parts(world: World) -> None:
    await world.pods.run(pod(), world.call())
    found = await world.pods.stats(PodStatsOf(pod_id="p1"), world.call())
    assert (found.pod_id, found.node, found.mock) == ("p1", "n1", True)
    assert found.vm is not None
    assert found.vm.overhead_bytes == 0
    assert found.guest is not None
    assert [(each.container_id, each.pid_count) for each in found.containers] == [("c1", 1)]


async def test_containers_that_the_pod_does_not_have_are_left_out(world: World) -> None:
    await world.pods.run(pod(), world.call())
    (guest,) = world.guests.by_vm_id.values()
    guest.containers["evil"] = guest.containers["c1"]
    found = await world.pods.stats(PodStatsOf(pod_id="p1"), world.call())
    assert [each.container_id for each in found.containers] == ["c1"]


async def test_without_the_guest_nobody_is_woken(world: World) -> None:
    await world.pods.run(pod(), world.call())
    found = await world.pods.stats(PodStatsOf(pod_id="p1", guest=False), world.call())
    assert (found.guest, found.containers, asked(world)) == (None, (), 0)
    assert found.vm is not None


async def test_a_paused_pod_is_told_without_its_guest(world: World) -> None:
    await world.pods.run(pod(), world.call())
    await world.pods.pause("p1", world.call())
    found = await world.pods.stats(PodStatsOf(pod_id="p1"), world.call())
    assert (found.guest, asked(world)) == (None, 0)
    assert found.vm is not None


async def test_all_who_ask_at_once_share_one_sample(world: World) -> None:
    await world.pods.run(pod(), world.call())
    found = await asyncio.gather(
        *(world.pods.stats(PodStatsOf(pod_id="p1"), world.call()) for _ in range(20))
    )
    assert asked(world) == 1
    assert len({id(sample) for sample in found}) == 1


async def test_who_follows_gets_a_later_sample_and_shares_it_with_other_followers(world: World) -> None:
    await world.pods.run(pod(), world.call())
    first = await world.pods.stats(PodStatsOf(pod_id="p1"), world.call())
    # The clock of this world goes on by a second at each look: it is time already.
    later = PodStatsOf(pod_id="p1", after=first.time, interval_s=0.1)
    found = await asyncio.gather(*(world.pods.stats(later, world.call()) for _ in range(5)))
    assert {sample.time for sample in found} == {found[0].time}
    assert found[0].time >= first.time + timedelta(seconds=0.1)
    assert asked(world) == 2
    assert world.pods._stats._last == world.pods._stats._followers == {}


async def test_a_clock_that_was_set_back_holds_nobody_up(world: World) -> None:
    await world.pods.run(pod(), world.call())
    first = await world.pods.stats(PodStatsOf(pod_id="p1"), world.call())
    future = first.time + timedelta(days=400)
    found = await world.pods.stats(PodStatsOf(pod_id="p1", after=future, interval_s=0.1), world.call())
    assert found.time < future


@pytest.mark.parametrize(
    ("end", "error"),
    [("stop", FailedPreconditionError), ("node", UnavailableError), ("delete", NotFoundError)],
)
async def test_who_waits_for_a_sample_hears_of_the_end(
    world: World, end: str, error: type[Exception]
) -> None:
    await world.pods.run(pod(), world.call())
    first = await world.pods.stats(PodStatsOf(pod_id="p1"), world.call())
    after = first.time + timedelta(days=1)
    wait = asyncio.ensure_future(
        world.pods.stats(PodStatsOf(pod_id="p1", after=after, interval_s=240), world.call())
    )
    await asyncio.sleep(0)
    assert not wait.done()
    if end == "node":
        await world.pods.wind_down()
    elif end == "stop":
        await world.pods.stop("p1", 0, world.call())
    else:
        await world.pods.delete("p1", True, world.call())
    with pytest.raises((error, FailedPreconditionError)):
        await wait
    assert world.pods._stats._bells == set()


async def test_a_pod_without_an_agent_has_its_vm_only(world: World) -> None:
    spec = pod(containers=()).model_copy(update={"agent_type": AgentType.NOOP})
    await world.pods.run(spec, world.call())
    with pytest.raises(UnsupportedError, match="guest: false"):
        await world.pods.stats(PodStatsOf(pod_id="p1"), world.call())
    found = await world.pods.stats(PodStatsOf(pod_id="p1", guest=False), world.call())
    assert found.vm is not None


async def test_a_pod_that_does_not_run_or_is_not_there_is_refused(world: World) -> None:
    with pytest.raises(NotFoundError):
        await world.pods.stats(PodStatsOf(pod_id="p1"), world.call())
    await world.pods.create(pod(), world.call())
    with pytest.raises(FailedPreconditionError, match="running"):
        await world.pods.stats(PodStatsOf(pod_id="p1"), world.call())


async def test_a_guest_that_fails_fails_the_command_and_not_the_pod(tmp_path: Path) -> None:
    world = await World(tmp_path, "agent.read_stats:1=fail").start()
    await world.pods.run(pod(), world.call())
    with pytest.raises(AgentError):
        await world.pods.stats(PodStatsOf(pod_id="p1"), world.call())
    assert (await world.pods.stats(PodStatsOf(pod_id="p1"), world.call())).guest is not None
    await world.close()
