"""Blocking work in threads, with its undo. A thread cannot be cancelled, so a cancelled caller waits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from vcnode.aio import finish

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Undo = Callable[[], object]

LIMIT_S = 30.0
"""Longest that one step may block: a dead network filesystem, say. The thread is then left to itself."""


def unwind(undo: list[Undo]) -> None:
    """Run *undo*, last first, each even if one before it failed; failures are logged."""
    while undo:
        try:
            undo.pop()()
        except Exception:
            log.warning("Undo failed", exc_info=True)


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run *function* in a thread; a cancellation is held back until it has returned.

    Raises:
        TimeoutError: It takes longer than LIMIT_S.
    """
    return await finish(asyncio.to_thread(function, *args, **kwargs), timeout_s=LIMIT_S)


async def make_in_thread(
    function: Callable[Concatenate[list[Undo], P], T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run *function*, which makes something, in a thread; on failure and on cancellation it is undone.

    *function* gets a list as its first argument and appends to it, before each step, what undoes the step.

    Raises:
        TimeoutError: It takes longer than LIMIT_S; what it makes later is not undone.
    """
    undo: list[Undo] = []

    def attempt() -> T:
        try:
            return function(undo, *args, **kwargs)
        except BaseException:
            unwind(undo)
            raise

    try:
        return await in_thread(attempt)
    except asyncio.CancelledError:
        await in_thread(unwind, undo)
        raise
