"""The few asyncio tools that the rest is built from; the only module that makes tasks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


async def finish(work: Coroutine[Any, Any, T], *, timeout_s: float) -> T:
    """Run *work* to its end, holding back any cancellation of the caller until then.

    A plain ``finally: await undo()`` is lost at a second cancel, and ``asyncio.shield`` alone lets the
    caller end before its undo; this survives both and is bounded.

    Args:
        work: The clean-up to run.
        timeout_s: Seconds after which *work* itself is cancelled.

    Returns:
        What *work* returned, if the caller was not cancelled meanwhile.

    Raises:
        TimeoutError: *work* did not end in time.
        asyncio.CancelledError: The caller was cancelled meanwhile; *work* has ended all the same, and its
            own error, if any, was logged.
    """

    async def bounded() -> T:
        async with asyncio.timeout(timeout_s):
            return await work

    task = asyncio.create_task(bounded())
    interrupted: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            interrupted = exc
    if interrupted is None:
        return task.result()
    if not task.cancelled() and task.exception() is not None:
        log.warning("Clean-up failed during cancellation", exc_info=task.exception())
    raise interrupted


class Spawner(Protocol):
    """Starts a background task that somebody else owns and ends."""

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run *work* in the background; an exception that escapes it is logged, never raised."""
        ...


class Tasks:
    """Owner of background tasks: none outlives it, and none can take the others down.

    ``asyncio.TaskGroup`` cancels all siblings when one task fails; a node must not lose every pod's
    watcher because one of them has a bug, so here a failure is logged under the task's name.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Start *work*; see `Spawner`.

        Raises:
            RuntimeError: The owner was closed already (*work* is closed unrun).
        """
        if self._closed:
            work.close()
            raise RuntimeError(f"Task {name} was started after its owner had closed.")
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("Task %s failed", task.get_name(), exc_info=exc)

    @property
    def count(self) -> int:
        """How many tasks are alive."""
        return len(self._tasks)

    async def join(self, *, timeout_s: float) -> bool:
        """Wait until no task is left, at most *timeout_s* seconds; False when some are still running."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._tasks:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return False
            await asyncio.wait(set(self._tasks), timeout=left)
        return True

    async def close(self) -> None:
        """Cancel every task and wait for all of them. Idempotent; nothing can be spawned afterwards."""
        self._closed = True
        while self._tasks:
            tasks = set(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def __aenter__(self) -> Tasks:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


class Interruptible:
    """A section of one task that somebody else may end with a given error.

    The section sees an ordinary cancellation, so its undo runs; whoever awaits it sees the error::

        section = Interruptible()
        async with section:       # elsewhere: section.interrupt(AbortedError("..."))
            ...

    A cancellation that came from outside as well wins over the interruption.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None
        self._error: BaseException | None = None
        self._ended = asyncio.Event()

    def interrupt(self, error: BaseException) -> None:
        """Cancel the section, which then raises *error*. No effect once it has ended or was interrupted."""
        if self._error is None and not self._ended.is_set():
            self._error = error
            if self._task is not None:
                self._task.cancel()

    async def ended(self) -> None:
        """Wait until the section has ended, its undo included."""
        await self._ended.wait()

    async def __aenter__(self) -> Interruptible:
        self._task = asyncio.current_task()
        if self._error is not None:
            self._ended.set()
            raise self._error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: object
    ) -> bool:
        task, self._task = self._task, None
        self._ended.set()
        if self._error is None or task is None:
            return False
        others = task.uncancel()
        if others == 0 and (kind is None or isinstance(exc, asyncio.CancelledError)):
            raise self._error from exc
        return False


@contextlib.asynccontextmanager
async def deadline_as(seconds: float | None, error: Callable[[], BaseException]) -> AsyncIterator[None]:
    """Bound a block to *seconds* (None: no bound); when they pass, raise ``error()`` from the time-out.

    A ``TimeoutError`` raised by the block itself passes through unchanged.
    """
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError as exc:
        if scope.expired():
            raise error() from exc
        raise
