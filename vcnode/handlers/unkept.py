"""Replies that the journal has not taken, until it does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from vcnode import logs
from vcnode.aio import Spawner, finish
from vcnode.errors import AlreadyExistsError, ResourceExhaustedError, UnavailableError
from vcnode.handlers.outcome import Outcome, as_duplicate

log = logging.getLogger(__name__)

MAX_UNKEPT = 1024
"""With so many, no command is begun that would need the journal."""
WRITE_LIMIT_S = 60.0
RETRY_FIRST_S, RETRY_MAX_S = 0.25, 15.0

Write = Callable[[], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class _Unkept:
    verb: str
    digest: str
    outcome: Outcome | None
    """The reply; None: there is none, the entry is to be dropped."""
    write: Write


class Unkept:
    """Commands whose last word the disk did not take; it is written again until it does.

    Meanwhile whoever sends such a command again gets its reply from here. What has none yet is refused, not
    begun again: the write that came too late may still be carried out, behind this one's back.

    Args:
        tasks: Owner of the task that writes; when it ends, what is left counts as unfinished at the next
            start.
    """

    def __init__(self, tasks: Spawner) -> None:
        self._tasks = tasks
        self._entries: dict[str, _Unkept] = {}
        self._writing = False

    def check_room(self) -> None:
        """Raise ResourceExhaustedError when no more is to be begun."""
        if len(self._entries) >= MAX_UNKEPT:
            raise ResourceExhaustedError(
                f"The replies of {MAX_UNKEPT} commands could not be written to the node's journal; see to "
                "the disk of its state directory.",
                limit=MAX_UNKEPT,
            )

    def find(self, command_id: str, verb: str, digest: str) -> Outcome | None:
        """The reply of a command that is here; None: it is not.

        Raises:
            AlreadyExistsError: The id is in use by another command.
            UnavailableError: Whether it was begun is not settled.
        """
        entry = self._entries.get(command_id)
        if entry is None:
            return None
        if (entry.verb, entry.digest) != (verb, digest):
            raise AlreadyExistsError(
                f"Command id {command_id} was used for another {entry.verb}; give each command its own id.",
                command_id=command_id,
                verb=entry.verb,
            )
        if entry.outcome is None:
            raise UnavailableError(
                "The node's journal has not answered for this command, and nothing was done; send it again.",
                command_id=command_id,
            )
        return as_duplicate(entry.outcome)

    def add(self, command_id: str, verb: str, digest: str, outcome: Outcome | None, write: Write) -> None:
        """Remember a command, and have *write* repeated until it succeeds; returns at once."""
        self._entries[command_id] = _Unkept(verb, digest, outcome, write)
        if not self._writing:
            self._writing = True
            with logs.own_work():  # it writes those of others, too
                self._tasks.spawn(self._write_all(), name="unkept replies")

    async def _write_all(self) -> None:
        wait_s = RETRY_FIRST_S
        try:
            while self._entries:
                command_id, entry = next(iter(self._entries.items()))
                try:
                    await finish(entry.write(), timeout_s=WRITE_LIMIT_S)
                except Exception as exc:  # whatever it is: what stands behind it must be written, too
                    log.debug("The journal still takes nothing: %s", exc)
                    await asyncio.sleep(wait_s)
                    wait_s = min(2 * wait_s, RETRY_MAX_S)
                else:
                    del self._entries[command_id]
                    wait_s = RETRY_FIRST_S
        finally:
            self._writing = False
