"""Nothing is allocated before its undo is registered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from vcnode import aio
from vcnode.errors import VcnodeError

log = logging.getLogger(__name__)

STEP_LIMIT_S = 30.0
"""Seconds that one undo may take before it counts as failed."""

Undo = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class _Step:
    what: str
    undo: Undo


class UndoStack:
    """Undos, run in reverse order when something goes wrong.

    Push each one *before* the step that it undoes, so it must succeed when there is nothing to undo::

        undo = UndoStack()
        undo.push("directory /run/x", lambda: remove("/run/x"))
        await make("/run/x")
        ...
        undo.drop()
    """

    def __init__(self, *, step_limit_s: float = STEP_LIMIT_S) -> None:
        self._steps: list[_Step] = []
        self._step_limit_s = step_limit_s
        self.leftovers: tuple[str, ...] = ()
        """What the last `unwind` could not undo, newest first."""

    def __len__(self) -> int:
        return len(self._steps)

    def push(self, what: str, undo: Undo) -> None:
        """Register *undo*; *what* names the thing for people, should it be left over."""
        self._steps.append(_Step(what, undo))

    def drop(self) -> None:
        """Forget all undos: what they would undo is to stay."""
        self._steps.clear()

    async def unwind(self) -> tuple[str, ...]:
        """Run every undo, newest first, each even if others fail; those that failed stay for another try.

        A cancellation is held back until all have run; `leftovers` is then set all the same.

        Returns:
            What could not be undone, as one phrase each; empty when all is undone.
        """
        limit_s = self._step_limit_s * (len(self._steps) + 1)
        return await aio.finish(self._unwind(), timeout_s=limit_s)

    async def _unwind(self) -> tuple[str, ...]:
        failed: list[_Step] = []
        phrases: list[str] = []
        while self._steps:
            step = self._steps.pop()
            try:
                async with asyncio.timeout(self._step_limit_s):
                    await step.undo()
            except Exception as exc:  # whatever it was: it is a leftover, and the other undos must run
                log.warning("Undo failed: %s", step.what, exc_info=exc)
                failed.append(step)
                phrases.append(_phrase(step.what, exc))
        self._steps = failed[::-1]
        self.leftovers = tuple(phrases)
        return self.leftovers


def _phrase(what: str, exc: Exception) -> str:
    if isinstance(exc, VcnodeError):
        return f"{what}: {exc.message}"
    if isinstance(exc, TimeoutError):
        return f"{what}: no answer in time"
    return f"{what}: {type(exc).__name__}"
