"""One command per pod."""

from __future__ import annotations

import asyncio

import pytest

from vcnode.errors import AbortedError, HypervisorError
from vcnode.pods.locks import PodLocks

START = frozenset({"pod.start"})


class Holder:
    """A command that holds a pod until told to end, and needs its time to undo."""

    def __init__(self, locks: PodLocks, verb: str) -> None:
        self.go, self.undo = asyncio.Event(), asyncio.Event()
        self.log: list[str] = []
        self.task = asyncio.ensure_future(self._run(locks, verb))

    async def _run(self, locks: PodLocks, verb: str) -> None:
        async with locks.hold("p", verb):
            self.log.append("held")
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                await self.undo.wait()
                self.log.append("undone")
                raise


async def test_another_command_is_refused_and_told_who_holds_the_pod() -> None:
    locks = PodLocks()
    holder = Holder(locks, "pod.stop")
    await asyncio.sleep(0)
    with pytest.raises(AbortedError) as caught:
        async with locks.hold("p", "pod.start"):
            pass
    assert caught.value.details["holder"] == "pod.stop"
    assert locks.holder("p") == "pod.stop"
    async with locks.hold("q", "pod.start"):
        assert locks.any_held
    holder.go.set()
    await holder.task
    assert locks.holder("p") is None
    assert not locks.any_held


async def test_an_overtaken_holder_undoes_first_and_ends_with_aborted() -> None:
    locks = PodLocks()
    holder = Holder(locks, "pod.start")
    await asyncio.sleep(0)

    async def stop() -> list[str]:
        async with locks.hold("p", "pod.stop", overtakes=START):
            return list(holder.log)

    stopping = asyncio.ensure_future(stop())
    await asyncio.sleep(0.01)
    assert not stopping.done()
    holder.undo.set()
    assert await stopping == ["held", "undone"]
    with pytest.raises(AbortedError, match=r"pod\.stop overtook pod\.start"):
        await holder.task


async def test_of_two_that_overtake_one_gets_the_pod_and_the_other_is_refused() -> None:
    locks = PodLocks()
    holder = Holder(locks, "pod.start")
    holder.undo.set()
    await asyncio.sleep(0)
    inside = asyncio.Event()
    go = asyncio.Event()

    async def overtake(verb: str) -> None:
        async with locks.hold("p", verb, overtakes=START):
            inside.set()
            await go.wait()

    tasks = [asyncio.ensure_future(overtake(v)) for v in ("pod.stop", "pod.delete")]
    await inside.wait()
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert [type(t.exception()) for t in done] == [AbortedError]
    go.set()
    await asyncio.gather(*waiting)
    await asyncio.wait([holder.task])


async def test_the_overtaken_holder_knows_who_overtook() -> None:
    locks = PodLocks()
    seen: list[str | None] = []

    async def start() -> None:
        async with locks.hold("p", "pod.start") as hold:
            try:
                await asyncio.Event().wait()
            finally:
                seen.append(hold.overtaken_by)

    task = asyncio.ensure_future(start())
    await asyncio.sleep(0)
    async with locks.hold("p", "pod.delete", overtakes=START):
        pass
    assert seen == ["pod.delete"]
    with pytest.raises(AbortedError):
        await task


async def test_seize_interrupts_with_its_own_error_and_waits_for_those_that_end_by_themselves() -> None:
    locks = PodLocks()
    interrupted = Holder(locks, "container.start")
    interrupted.undo.set()
    await asyncio.sleep(0)
    async with locks.seize("p", "x", lambda: HypervisorError("It died."), waits_for=frozenset()):
        pass
    with pytest.raises(HypervisorError, match="It died"):
        await interrupted.task

    patient = Holder(locks, "pod.stop")
    await asyncio.sleep(0)

    async def seize() -> None:
        waits_for = frozenset({"pod.stop"})
        async with locks.seize("p", "x", lambda: HypervisorError("It died."), waits_for=waits_for):
            pass

    task = asyncio.ensure_future(seize())
    await asyncio.sleep(0.01)
    assert not task.done()
    patient.go.set()
    await task
    await patient.task


async def test_a_cancellation_from_outside_wins_over_being_overtaken() -> None:
    locks = PodLocks()
    holder = Holder(locks, "pod.start")
    await asyncio.sleep(0)
    stop = asyncio.ensure_future(locks.hold("p", "pod.stop", overtakes=START).__aenter__())
    await asyncio.sleep(0)
    holder.task.cancel()
    holder.undo.set()
    with pytest.raises(asyncio.CancelledError):
        await holder.task
    await stop
