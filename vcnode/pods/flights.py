"""Work that several callers want at once is done once, for as long as one of them still waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vcnode import aio
from vcnode.aio import Spawner
from vcnode.errors import UnavailableError

T = TypeVar("T")

END_LIMIT_S = 90.0
"""Seconds for the undo of work that nobody waits for any more."""


@dataclass(slots=True)
class _Flight(Generic[T]):
    result: asyncio.Future[T]
    task: asyncio.Task[None]
    waiters: int = 0


class Flights(Generic[T]):
    """Running work, by key.

    Args:
        tasks: Runs it; to be closed after the last caller.
    """

    def __init__(self, tasks: Spawner) -> None:
        self._tasks = tasks
        self._flights: dict[str, _Flight[T]] = {}

    async def join(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of ``work()``, or of the same *key*'s work that runs already.

        All who wait get the same result or error. When the last of them is cancelled, the work is, too, and
        has ended when this returns.

        Raises:
            UnavailableError: The owner of the tasks is closing.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = self._begin(key, work)
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.result)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                # From here on nobody may join: whoever comes now begins anew.
                if self._flights.get(key) is flight:
                    del self._flights[key]
                if not flight.result.done():
                    flight.task.cancel()
                await aio.finish(_ended(flight.task), timeout_s=END_LIMIT_S)

    def _begin(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> _Flight[T]:
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        result.add_done_callback(_seen)
        flight: _Flight[T]

        async def run() -> None:
            try:
                value = await work()
            except asyncio.CancelledError:
                _settle(result, UnavailableError("The node agent is stopping."))
                raise
            except Exception as exc:  # it goes to those who wait, as it is
                _settle(result, exc)
            else:
                if not result.done():
                    result.set_result(value)
            finally:
                if self._flights.get(key) is flight:
                    del self._flights[key]

        flight = _Flight(result, self._tasks.spawn(run(), name=f"flight {key[:80]}"))
        return flight


def _settle(result: asyncio.Future[T], error: Exception) -> None:
    if not result.done():
        result.set_exception(error)


def _seen(result: asyncio.Future[T]) -> None:
    """Nobody may be left to look at an error; it was not lost for that."""
    if not result.cancelled():
        result.exception()


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task})
