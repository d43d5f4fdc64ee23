"""One command per pod at a time; some may overtake."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from vcnode import aio
from vcnode.errors import AbortedError, VcnodeError

RESTART_CONTAINER = "container.restart"
RESTART_POD = "pod.restart"
BACKGROUND = frozenset({RESTART_CONTAINER, RESTART_POD})
"""Holders that nobody has asked for: commands wait for them, or overtake them, and are not refused."""


@dataclass(slots=True)
class Hold:
    """A command that holds a pod."""

    verb: str
    overtaken_by: str | None = None
    """Verb of the command that interrupted this one, if one did."""
    section: aio.Interruptible = field(default_factory=aio.Interruptible)
    released: asyncio.Event = field(default_factory=asyncio.Event)


class PodLocks:
    """A lock per pod that refuses or overtakes, and never queues a command behind a slow one."""

    def __init__(self) -> None:
        self._held: dict[str, Hold] = {}

    @property
    def any_held(self) -> bool:
        """Whether some pod is held."""
        return bool(self._held)

    def holder(self, pod_id: str) -> str | None:
        """Verb of the command that holds the pod."""
        hold = self._held.get(pod_id)
        return None if hold is None else hold.verb

    @contextlib.asynccontextmanager
    async def hold(
        self,
        pod_id: str,
        verb: str,
        *,
        overtakes: frozenset[str] = frozenset(),
        patient: bool = False,
    ) -> AsyncIterator[Hold]:
        """Hold the pod for a block.

        Args:
            pod_id: The pod; it need not exist.
            verb: The command that wants it.
            overtakes: Verbs of holders that are interrupted: they undo what they did and end with
                `AbortedError`, which this waits for.
            patient: Wait for a holder that cannot be overtaken, too, for as long as it takes.

        Raises:
            AbortedError: Another command holds the pod; or this one was overtaken.
        """
        while (held := self._held.get(pod_id)) is not None:
            if held.verb not in overtakes and (patient or held.verb in BACKGROUND):
                await held.released.wait()
                continue
            if held.verb not in overtakes:
                raise AbortedError(
                    f"{held.verb} holds pod {pod_id}; try again when it is done.",
                    pod_id=pod_id,
                    holder=held.verb,
                )
            await _interrupt(held, verb, AbortedError(f"{verb} overtook {held.verb} of pod {pod_id}."))
        async with self._take(pod_id, verb) as hold:
            yield hold

    @contextlib.asynccontextmanager
    async def seize(
        self,
        pod_id: str,
        verb: str,
        error: Callable[[], VcnodeError],
        *,
        waits_for: frozenset[str],
    ) -> AsyncIterator[Hold]:
        """Hold the pod for something that must happen, such as noticing that its VM is gone.

        A holder is interrupted with *error*, except those in *waits_for*, which end by themselves.
        """
        while (held := self._held.get(pod_id)) is not None:
            if held.verb in waits_for:
                await held.released.wait()
            else:
                await _interrupt(held, verb, error())
        async with self._take(pod_id, verb) as hold:
            yield hold

    @contextlib.asynccontextmanager
    async def _take(self, pod_id: str, verb: str) -> AsyncIterator[Hold]:
        # No await between the check in the callers and this line, so no two can take the same pod.
        hold = self._held[pod_id] = Hold(verb)
        try:
            async with hold.section:
                yield hold
        finally:
            del self._held[pod_id]
            hold.released.set()


async def _interrupt(held: Hold, verb: str, error: VcnodeError) -> None:
    if held.overtaken_by is None:
        held.overtaken_by = verb
    held.section.interrupt(error)
    await held.released.wait()
