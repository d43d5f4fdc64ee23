"""When the fleet last heard of this node, also across restarts of the node agent.

Told in seconds since the host has booted, its sleep included (CLOCK_BOOTTIME): no VM outlives its host, and
nobody sets that clock.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_clock() -> float:
    """Seconds since the host has booted."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Contact:
    """The last contact that is known; made by `open` where it is to outlive the process.

    Args:
        path: File that keeps it; None: it ends with the process.
        clock: Seconds since the host has booted.
        boot_id: Of this boot of the host.
    """

    def __init__(
        self, path: Path | None = None, *, clock: Callable[[], float] = boot_clock, boot_id: str = ""
    ) -> None:
        self._path = path
        self._boot_id = boot_id
        self.clock = clock
        self.at_s = clock()
        """When it was. Without any: when the node agent began to count."""
        self.on_heard: list[Callable[[], None]] = []
        """Each is called at every contact."""

    @classmethod
    def open(cls, path: Path, *, clock: Callable[[], float] = boot_clock) -> Contact:
        """The contact that an earlier process of this boot has had; none: from now on."""
        contact = cls(path, clock=clock, boot_id=BOOT_ID.read_text().strip())
        try:
            kept = json.loads(path.read_text())
            if kept["boot_id"] == contact._boot_id:
                contact.at_s = min(contact.at_s, float(kept["at_s"]))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as exc:
            log.warning("%s cannot be read; counting from now", path, exc_info=exc)
        return contact

    @property
    def silent_s(self) -> float:
        """Seconds since then."""
        return max(0.0, self.clock() - self.at_s)

    def note(self, at_s: float) -> None:
        """There was one at *at_s*, by `clock`."""
        self.at_s = max(self.at_s, at_s)
        for listener in self.on_heard:
            listener()

    def save(self) -> None:
        """Keep it for the next process. Not synced: what a crash of the host loses, nobody needs.

        A file that cannot be written leaves an older contact there, from which more time has passed.
        """
        if self._path is None:
            return
        beside = self._path.with_suffix(".new")
        try:
            beside.write_text(json.dumps({"boot_id": self._boot_id, "at_s": self.at_s}))
            os.replace(beside, self._path)
        except OSError as exc:
            log.warning("%s cannot be written", self._path, exc_info=exc)
