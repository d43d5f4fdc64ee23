import asyncio
import logging

import pytest

from vcnode.aio import Interruptible, Tasks, deadline_as, finish


class Steps:
    """Work that waits where it is told to, so that tests can act in the middle of it."""

    def __init__(self) -> None:
        self.begun, self.go_on, self.done = asyncio.Event(), asyncio.Event(), False
        self.cancelled = False

    async def work(self) -> str:
        self.begun.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        self.done = True
        return "result"


@pytest.fixture
def steps():
    return Steps()


class TestFinish:
    async def test_result_is_returned(self, steps):
        steps.go_on.set()
        assert await finish(steps.work(), timeout_s=5) == "result"

    async def test_error_is_raised(self):
        async def fail():
            raise KeyError("x")

        with pytest.raises(KeyError):
            await finish(fail(), timeout_s=5)

    @pytest.mark.parametrize("cancels", [1, 2, 5])
    async def test_work_ends_before_any_number_of_cancels_gets_through(self, steps, cancels):
        caller = asyncio.create_task(finish(steps.work(), timeout_s=5))
        await steps.begun.wait()
        for _ in range(cancels):
            caller.cancel()
            await asyncio.wait({caller}, timeout=0)
        assert not caller.done()
        steps.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert steps.done

    async def test_work_that_takes_too_long_is_cancelled(self, steps):
        with pytest.raises(TimeoutError):
            await finish(steps.work(), timeout_s=0.01)
        assert steps.cancelled

    async def test_cancelled_caller_of_work_that_takes_too_long_sees_the_cancel(self, steps, caplog):
        caller = asyncio.create_task(finish(steps.work(), timeout_s=0.05))
        await steps.begun.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert steps.cancelled
        assert "Clean-up failed" in caplog.text

    async def test_error_of_the_work_is_logged_when_the_cancel_wins(self, steps, caplog):
        async def fail():
            await steps.work()
            raise KeyError("the reason")

        caller = asyncio.create_task(finish(fail(), timeout_s=5))
        await steps.begun.wait()
        caller.cancel()
        await asyncio.wait({caller}, timeout=0)
        steps.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert "the reason" in caplog.text

    async def test_outer_timeout_still_says_that_it_was_one(self, steps):
        async def release():
            await steps.begun.wait()
            async with asyncio.timeout(10):
                while not caller.cancelling():
                    await asyncio.wait({caller}, timeout=0.005)
            steps.go_on.set()

        async def call():
            async with asyncio.timeout(0.02):
                await finish(steps.work(), timeout_s=5)

        caller = asyncio.create_task(call())
        await release()
        with pytest.raises(TimeoutError):
            await caller
        assert steps.done


class TestTasks:
    async def test_failure_is_logged_and_hurts_no_sibling(self, steps, caplog):
        async def fail():
            raise RuntimeError("boom")

        async with Tasks() as tasks:
            sibling = tasks.spawn(_run(steps), name="sibling")
            failing = tasks.spawn(fail(), name="failing one")
            await asyncio.wait({failing})
            assert not sibling.done()
            steps.go_on.set()
            assert await tasks.join(timeout_s=5)
        assert "failing one" in caplog.text
        assert "boom" in caplog.text

    async def test_cancelled_task_is_no_failure(self, steps, caplog):
        async with Tasks() as tasks:
            tasks.spawn(_run(steps), name="x")
            await steps.begun.wait()
        assert steps.cancelled
        assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []

    async def test_count_and_join_tell_what_runs(self, steps):
        async with Tasks() as tasks:
            assert await tasks.join(timeout_s=0)
            tasks.spawn(_run(steps), name="x")
            assert tasks.count == 1
            assert not await tasks.join(timeout_s=0.01)
            steps.go_on.set()
            assert await tasks.join(timeout_s=5)
            assert tasks.count == 0

    async def test_join_waits_for_tasks_that_tasks_start(self):
        ran = []

        async def child():
            ran.append("child")

        async def parent(tasks):
            tasks.spawn(child(), name="child")

        async with Tasks() as tasks:
            tasks.spawn(parent(tasks), name="parent")
            assert await tasks.join(timeout_s=5)
        assert ran == ["child"]

    async def test_close_cancels_again_what_resists(self):
        cancels = []

        async def stubborn():
            while len(cancels) < 2:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancels.append(1)
                    if len(cancels) == 2:
                        raise

        tasks = Tasks()
        task = tasks.spawn(stubborn(), name="stubborn")
        await asyncio.sleep(0)
        closing = asyncio.create_task(tasks.close())
        await asyncio.wait({closing}, timeout=0.05)
        task.cancel()
        await closing
        assert len(cancels) == 2

    async def test_nothing_starts_after_close(self, steps):
        tasks = Tasks()
        await tasks.close()
        await tasks.close()
        with pytest.raises(RuntimeError, match="late one"):
            tasks.spawn(_run(steps), name="late one")
        assert not steps.begun.is_set()


async def _run(steps: Steps) -> None:
    await steps.work()


class _ForTestError(Exception):
    pass


class TestInterruptible:
    async def _section(self, section: Interruptible, steps: Steps, undone: list[str]) -> str:
        async with section:
            try:
                await steps.work()
            except asyncio.CancelledError:
                undone.append("undo")
                raise
        return "after"

    async def test_undisturbed_section_ends_as_usual(self, steps):
        section = Interruptible()
        steps.go_on.set()
        assert await self._section(section, steps, []) == "after"
        await section.ended()

    async def test_interrupted_section_runs_its_undo_and_raises_the_given_error(self, steps):
        section, undone = Interruptible(), []
        task = asyncio.create_task(self._section(section, steps, undone))
        await steps.begun.wait()
        section.interrupt(_ForTestError())
        await section.ended()
        assert undone == ["undo"]
        with pytest.raises(_ForTestError):
            await task

    async def test_task_goes_on_uncancelled_after_the_error_was_caught(self, steps):
        section = Interruptible()

        async def caller():
            with pytest.raises(_ForTestError):
                await self._section(section, steps, [])
            await asyncio.sleep(0)
            return asyncio.current_task().cancelling()

        task = asyncio.create_task(caller())
        await steps.begun.wait()
        section.interrupt(_ForTestError())
        assert await task == 0

    async def test_interruption_before_the_section_keeps_it_from_starting(self, steps):
        section = Interruptible()
        section.interrupt(_ForTestError())
        with pytest.raises(_ForTestError):
            await self._section(section, steps, [])
        assert not steps.begun.is_set()
        await section.ended()

    async def test_interruption_after_the_end_is_without_effect(self, steps):
        section = Interruptible()
        steps.go_on.set()
        await self._section(section, steps, [])
        section.interrupt(_ForTestError())
        await asyncio.sleep(0)

    async def test_only_the_first_interruption_counts(self, steps):
        section, undone = Interruptible(), []
        task = asyncio.create_task(self._section(section, steps, undone))
        await steps.begun.wait()
        section.interrupt(_ForTestError("first"))
        section.interrupt(KeyError("second"))
        with pytest.raises(_ForTestError, match="first"):
            await task
        assert undone == ["undo"]

    async def test_cancellation_from_outside_wins(self, steps):
        section = Interruptible()
        task = asyncio.create_task(self._section(section, steps, []))
        await steps.begun.wait()
        section.interrupt(_ForTestError())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_plain_cancellation_passes_through(self, steps):
        task = asyncio.create_task(self._section(Interruptible(), steps, []))
        await steps.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def test_own_error_of_an_interrupted_section_is_not_hidden(self, steps):
        section = Interruptible()

        async def fails():
            async with section:
                try:
                    await steps.work()
                except asyncio.CancelledError:
                    raise KeyError("undo failed") from None

        task = asyncio.create_task(fails())
        await steps.begun.wait()
        section.interrupt(_ForTestError())
        with pytest.raises(KeyError):
            await task


class TestDeadlineAs:
    async def test_passing_the_deadline_raises_the_given_error(self):
        with pytest.raises(_ForTestError) as caught:
            async with deadline_as(0.001, _ForTestError):
                await asyncio.Event().wait()
        assert isinstance(caught.value.__cause__, TimeoutError)

    async def test_no_deadline_and_an_early_end_are_fine(self):
        for seconds in (None, 10):
            async with deadline_as(seconds, _ForTestError):
                await asyncio.sleep(0)

    async def test_timeout_of_the_block_itself_passes_unchanged(self):
        with pytest.raises(TimeoutError, match="own"):
            async with deadline_as(10, _ForTestError):
                raise TimeoutError("own")

    async def test_cancellation_passes_unchanged(self):
        async def block():
            async with deadline_as(10, _ForTestError):
                await asyncio.Event().wait()

        task = asyncio.create_task(block())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
