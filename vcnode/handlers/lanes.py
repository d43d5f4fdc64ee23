"""How many commands may be in progress at once."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from vcnode.errors import ResourceExhaustedError
from vcnode.models.commands import Command

ENDING = frozenset(
    {"pod.stop", "pod.delete", "container.stop", "container.kill", "container.delete", "session.close"}
)
"""Verbs that end things; a node full of hanging commands must still take these."""

WAITING = frozenset({"container.wait", "container.logs", "pod.stats"})
"""Verbs that wait, or may be asked to; many may, and none may keep others out."""


class Lane(Enum):
    """Commands are bounded per lane, so that one kind cannot keep the others out."""

    READ = "read"
    WORK = "work"
    END = "end"
    WAIT = "wait"

    @classmethod
    def of(cls, command: Command) -> Lane:
        """The lane of *command*."""
        if command.verb in WAITING:
            return cls.WAIT
        if not command.mutates:
            return cls.READ
        return cls.END if command.verb in ENDING else cls.WORK


class Slot:
    """A place in a lane. Free it exactly when the command has been answered; freeing twice is harmless."""

    def __init__(self, free: Callable[[], None]) -> None:
        self._free: Callable[[], None] | None = free

    def free(self) -> None:
        """Give the place back."""
        free, self._free = self._free, None
        if free is not None:
            free()


class Lanes:
    """Places for commands, bounded in each lane.

    Args:
        limit: Commands in progress at once, in each lane.
        waits: The same for those that only wait.
    """

    def __init__(self, limit: int, waits: int) -> None:
        self._limits = {**dict.fromkeys(Lane, limit), Lane.WAIT: waits}
        self._taken = dict.fromkeys(Lane, 0)

    @property
    def taken(self) -> int:
        """Places taken, over all lanes."""
        return sum(self._taken.values())

    def take(self, command: Command) -> Slot:
        """Take a place.

        Raises:
            ResourceExhaustedError: The lane is full.
        """
        lane = Lane.of(command)
        if self._taken[lane] >= (limit := self._limits[lane]):
            raise ResourceExhaustedError(
                f"{limit} commands are in progress; try again later.",
                limit=limit,
                lane=lane.value,
            )
        self._taken[lane] += 1

        def free() -> None:
            self._taken[lane] -= 1

        return Slot(free)
