"""The queue of starts: who goes first, who waits where, and what remains of those that give up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.pods.world import World, pod
from vcnode.errors import ResourceExhaustedError
from vcnode.models.pod import PodState
from vcnode.pods.queue import StartQueue
from vcnode.settings import LimitSettings


async def test_higher_priorities_go_first_and_equals_in_the_order_of_arrival():
    queue = StartQueue(slots=1, places=10)
    first = queue.enter("first", 0)
    waiting = {
        name: queue.enter(name, priority) for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5))
    }
    assert first.granted.is_set()
    assert [queue.position(name) for name in ("b", "d", "a", "c", "first")] == [1, 2, 3, 4, None]
    order = []
    running = first
    while waiting:
        queue.leave(running)
        (name,) = [n for n, t in waiting.items() if t.granted.is_set()]
        running = waiting.pop(name)
        order.append(name)
    assert order == ["b", "d", "a", "c"]


async def test_a_full_queue_says_when_to_try_again():
    queue = StartQueue(slots=2, places=1)
    tickets = [queue.enter(f"p{n}", 0) for n in range(3)]
    with pytest.raises(ResourceExhaustedError) as caught:
        queue.enter("p3", 1000)
    assert caught.value.details["retry_after_s"] >= 1
    queue.leave(tickets[0])
    assert queue.waiting == 0
    queue.enter("p3", 0)
    assert queue.position("p3") == 1


async def test_leaving_is_idempotent_and_frees_one_slot_only():
    queue = StartQueue(slots=1, places=5)
    a, b, c = (queue.enter(name, 0) for name in "abc")
    queue.leave(a)
    queue.leave(a)
    assert b.granted.is_set()
    assert not c.granted.is_set()
    queue.leave(c)
    queue.leave(b)
    await asyncio.wait_for(queue.idle(), 1)
    assert queue.enter("d", 0).granted.is_set()


async def test_a_queued_start_shows_its_place_and_a_cancelled_one_leaves_it(tmp_path: Path):
    world = World(
        tmp_path, "agent.connect:1=hang", limits=LimitSettings(concurrent_starts=1, queued_starts=2)
    )
    await world.start()
    starts = [asyncio.ensure_future(world.pods.run(pod("p1"), world.call("pod.run")))]
    await world.until_event("pod.starting", 1)
    for number, priority in ((2, 0), (3, 7)):
        spec = pod(f"p{number}", priority=priority)
        starts.append(asyncio.ensure_future(world.pods.run(spec, world.call("pod.run"))))
        await world.until_event("pod.starting", number)
    assert [world.pods.status(f"p{n}").queue_position for n in (1, 2, 3)] == [None, 2, 1]
    with pytest.raises(ResourceExhaustedError):
        await world.pods.run(pod("p4"), world.call("pod.run"))
    assert "pod.created" not in await world.kinds("p4")
    starts[2].cancel()  # as the deadline of its command does
    await asyncio.wait([starts[2]])
    assert world.pods.status("p2").queue_position == 1
    starts[0].cancel()
    assert (await asyncio.wait_for(starts[1], 10)).state is PodState.RUNNING
    assert world.pods.queued_starts == 0
    await asyncio.wait_for(asyncio.wait([starts[0]]), 10)
    assert [p.pod_id for p in world.pods.list({}, ()).pods] == ["p2"]
    await world.close()
